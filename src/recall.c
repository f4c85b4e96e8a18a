/* How the parts of a score are computed; the formulas stand in pyx/_recall.pyx. */
#include "recall.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "recall_view.h"
#include "top.h"

#define CHUNK 256 /* rows compared at a time: their products stay in the first-level cache */
#define CLOSE 0.1f /* to the mean: int8 does not tell in which direction */

/* ---- vectors ---- */

/* What every row is compared with: the question less the mean, and the mean, both packed. */
typedef struct {
    int8_t *packed;          /* two rows */
    float by_query, by_mean; /* their scales */
    float length;            /* of the question less the mean */
    float across;            /* its product with the mean */
    float mean_square;
} wf_compared;

static int take_aim(wf_compared *aim, const wf_ask *ask)
{
    size_t d = ask->rows.dimension, stride = ask->rows.stride;
    double squares = 0.0, across = 0.0, length = 0.0;
    float *moved = malloc(d * sizeof *moved);
    *aim = (wf_compared){.packed = aligned_alloc(WF_ALIGNMENT, 2 * stride)};
    if (!moved || !aim->packed) {
        free(moved);
        return -1;
    }
    memset(aim->packed, 0, 2 * stride);
    for (size_t j = 0; j < d; j++) {
        moved[j] = ask->vector[j] - ask->mean[j];
        squares += (double)ask->mean[j] * ask->mean[j];
        across += (double)moved[j] * ask->mean[j];
        length += (double)moved[j] * moved[j];
    }
    length = sqrt(length);
    aim->mean_square = (float)squares, aim->across = (float)across, aim->length = (float)length;
    aim->by_query = (float)(wf_pack(moved, d, aim->packed) * length);
    aim->by_mean = (float)(wf_pack(ask->mean, d, aim->packed + stride) * sqrt(squares));
    free(moved);
    return 0;
}

static void compare_rows(wf_view *view, const wf_compared *aim, size_t first, size_t count)
{
    const wf_rows *rows = &view->ask->rows;
    const int8_t *packed = rows->table->packed + first * rows->stride;
    const float *scale = rows->table->scale + first;
    int32_t with_query[CHUNK], with_mean[CHUNK];
    float cosine[CHUNK];
    view->ask->scan(packed, rows->stride, aim->packed, count, with_query);
    view->ask->scan(packed, rows->stride, aim->packed + rows->stride, count, with_mean);
    for (size_t i = 0; i < count; i++) {
        float along = (float)with_query[i] * scale[i] * aim->by_query - aim->across;
        float apart = 1.0f - 2.0f * (float)with_mean[i] * scale[i] * aim->by_mean + aim->mean_square;
        float value = along / (sqrtf(apart) * aim->length);
        value = value > 1.0f ? 1.0f : value < -1.0f ? -1.0f : value;
        cosine[i] = scale[i] > 0.0f && apart > CLOSE * CLOSE ? value : 0.0f;
    }
    for (size_t i = 0; i < count; i++)
        if (view->place[first + i] != WF_NOWHERE)
            view->cosine[view->place[first + i]] = cosine[i];
}

/* Cosines of the rows with the question, both less the rows' mean: (x - m)(q - m) / |x - m| |q - m|, |x| = 1. */
static int compare(wf_view *view)
{
    const wf_ask *ask = view->ask;
    wf_compared aim;
    int failed = take_aim(&aim, ask);
    if (!failed && aim.length > CLOSE) {
        for (size_t first = 0; !ask->only && first < view->rows; first += CHUNK)
            compare_rows(view, &aim, first, view->rows - first < CHUNK ? view->rows - first : CHUNK);
        for (size_t i = 0; i < ask->only_count; i++)
            if (ask->only[i] < view->rows)
                compare_rows(view, &aim, ask->only[i], 1);
    }
    free(aim.packed);
    return failed;
}

/* ---- the other parts ---- */

/* Month and day of a time, UTC: Howard Hinnant's civil_from_days. */
static void calendar(double at, unsigned *month, unsigned *day)
{
    long long days = (long long)floor(at / 86400.0) + 719468;
    long long era = (days >= 0 ? days : days - 146096) / 146097;
    unsigned doe = (unsigned)(days - era * 146097);
    unsigned yoe = (doe - doe / 1460 + doe / 36524 - doe / 146096) / 365;
    unsigned doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    unsigned mp = (5 * doy + 2) / 153;
    *day = doy - (153 * mp + 2) / 5 + 1;
    *month = mp < 10 ? mp + 3 : mp - 9;
}

static float named_date(const wf_ask *ask, double at)
{
    unsigned month, day;
    if (fabs(at) > 1e15)
        return 0.0f;
    calendar(at, &month, &day);
    if (!(ask->months >> month & 1))
        return 0.0f;
    return ask->days >> day & 1 ? 3.0f : 1.0f;
}

typedef float wf_parts[WF_PARTS][WF_BLOCK];

/* The parts that few questions ask for. */
static void take_named(wf_parts part, const wf_view *view, size_t first)
{
    const wf_ask *ask = view->ask;
    const wf_table *table = ask->rows.table;
    for (size_t i = 0; i < WF_BLOCK; i++) {
        uint32_t row = view->row[first + i];
        if (row == WF_NO_ROW)
            continue;
        if (ask->months)
            part[WF_DATE][i] = named_date(ask, table->at[row]);
        if (ask->speaker != WF_NO_SPEAKER)
            part[WF_SPEAKER][i] = (table->mark[row] & ~WF_ASKS) == ask->speaker ? 1.0f : -1.0f;
        if (ask->half_life > 0.0)
            part[WF_RECENCY][i] = (float)exp2(-fmax(0.0, ask->now - table->at[row]) / ask->half_life);
    }
}

static void take_parts(wf_parts part, const wf_view *view, size_t first)
{
    const float *cosine = view->cosine + first, *own = view->own + first, *asks = view->asks + first;
    memcpy(part[WF_COVERAGE], view->coverage + first, sizeof *part);
    memcpy(part[WF_SESSION], view->session_fit + first, sizeof *part);
    memcpy(part[WF_COSINE], cosine, sizeof *part);
    memcpy(part[WF_QUESTION], asks, sizeof *part);
    for (int i = 0; i < WF_BLOCK; i++) {
        part[WF_AROUND][i] = WF_FALL[1] * (cosine[i - 1] + cosine[i + 1]) + WF_FALL[2] * (cosine[i - 2] + cosine[i + 2]) +
                             WF_FALL[3] * (cosine[i - 3] + cosine[i + 3]);
        part[WF_REPLY][i] = own[i - 1] * asks[i - 1];
    }
    if (view->ask->months || view->ask->speaker != WF_NO_SPEAKER || view->ask->half_life > 0.0)
        take_named(part, view, first);
}

static void show_parts(const wf_parts part, const wf_view *view, size_t first)
{
    for (size_t i = 0; i < WF_BLOCK; i++)
        for (size_t p = 0; p < WF_PARTS && view->row[first + i] != WF_NO_ROW; p++)
            view->ask->parts[p * view->rows + view->row[first + i]] = part[p][i];
}

static size_t best_rows(const wf_view *view)
{
    const wf_ask *ask = view->ask;
    wf_parts part = {{0}};
    size_t size = 0;
    for (size_t first = 0; first < view->blocks * WF_BLOCK; first += WF_BLOCK) {
        float score[WF_BLOCK] = {0};
        take_parts(part, view, first);
        for (size_t p = 0; p < WF_PARTS; p++)
            for (int i = 0; i < WF_BLOCK; i++)
                score[i] += ask->weights[p] * part[p][i];
        for (int i = 0; i < WF_BLOCK; i++)
            if (view->row[first + i] != WF_NO_ROW)
                size = wf_offer(ask->hits, size, ask->k, (wf_hit){view->row[first + i], score[i]});
        if (ask->parts)
            show_parts(part, view, first);
    }
    wf_best_first(ask->hits, size);
    return size;
}

void wf_answer(wf_ask *ask)
{
    wf_view view;
    ask->found = ask->rows.count ? -1 : 0;
    if (!ask->rows.count)
        return;
    pthread_rwlock_rdlock(&ask->postings->lock);
    int failed = wf_see(&view, ask) || (ask->terms && wf_match_words(&view));
    pthread_rwlock_unlock(&ask->postings->lock);
    if (!failed && !(ask->vector && compare(&view)))
        ask->found = (ptrdiff_t)best_rows(&view);
    wf_view_free(&view);
}
