/* Which scan paths run here. __builtin_cpu_supports asks the processor (cpuid) and, for the wide registers, whether
 * the operating system saves them (xgetbv). */
#include "vector.h"

static wf_path found[4];
static size_t found_count;

static void add(const char *name, wf_scan scan)
{
    found[found_count++] = (wf_path){name, scan};
}

size_t wf_paths(const wf_path **paths)
{
    if (!found_count) {
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vnni"))
            add("avx512vnni", wf_scan_avx512vnni);
        if (__builtin_cpu_supports("avx2"))
            add("avx2", wf_scan_avx2);
#elif defined(__aarch64__)
        add("neon", wf_scan_neon);
#endif
        add("scalar", wf_scan_scalar);
    }
    *paths = found;
    return found_count;
}
