/* How the parts of a score are computed; the formulas stand in pyx/_recall.pyx. */
#include "recall.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "top.h"

#define CHUNK 256 /* rows compared at a time: their products stay in the first-level cache */
#define NEAR 3 /* turns to either side that count */
#define CLOSE 0.1 /* to the mean: int8 does not tell in which direction */

static const float FALL[NEAR + 1] = {1.0f, 0.6f, 0.4f, 0.3f};

/* Everything of one question that is as long as there are rows. */
typedef struct {
    size_t n, seen;            /* rows; those that may be seen */
    uint8_t *visible;
    uint32_t *before, *after;  /* the nearest visible row of the session to either side */
    uint32_t *session;
    float *own;                /* coverage by the row itself */
    float *best, *match;       /* of the term at hand: with its neighbours', its own */
    uint32_t *touched;
    float *part[WF_PARTS];
    void *memory;
} wf_work;

static int make(wf_work *work, const wf_ask *ask)
{
    size_t n = ask->rows.count, columns = 7 + (ask->parts ? 0 : WF_PARTS);
    float *at = calloc(n * columns + n / 4 + 1, sizeof *at);
    *work = (wf_work){.n = n, .memory = at};
    if (!at)
        return -1;
    work->own = at, work->best = at += n, work->match = at += n;
    work->before = (uint32_t *)(at += n), work->after = (uint32_t *)(at += n);
    work->session = (uint32_t *)(at += n), work->touched = (uint32_t *)(at += n);
    for (size_t part = 0; part < WF_PARTS; part++)
        work->part[part] = ask->parts ? ask->parts + part * n : (at += n);
    work->visible = (uint8_t *)(at += n);
    return 0;
}

static int visible(const wf_ask *ask, size_t row)
{
    const wf_table *table = ask->rows.table;
    uint32_t scope = table->scope[row];
    return scope != WF_REMOVED && scope < ask->scopes && ask->allowed[scope] && table->at[row] >= ask->since &&
           table->at[row] <= ask->until;
}

/* Links the visible rows of each session, and numbers the sessions. Returns how many there are. */
static uint32_t link_rows(wf_work *work, const wf_ask *ask)
{
    const uint32_t *previous = ask->rows.table->previous;
    uint32_t sessions = 0;
    for (size_t i = 0; i < work->n; i++) {
        uint32_t one = previous[i];
        work->seen += work->visible[i] = (uint8_t)visible(ask, i);
        work->after[i] = WF_NO_ROW;
        work->session[i] = one == WF_NO_ROW ? sessions++ : work->session[one];
        work->before[i] = one == WF_NO_ROW || work->visible[one] ? one : work->before[one];
        if (work->visible[i] && work->before[i] != WF_NO_ROW)
            work->after[work->before[i]] = (uint32_t)i;
    }
    return sessions;
}

/* ---- words ---- */

typedef struct {
    const wf_term *term;
    uint32_t asked;
    float match;
} wf_match;

typedef struct {
    wf_match *list;
    size_t count, capacity;
} wf_matches;

static int keep(wf_matches *matches, wf_match match)
{
    if (matches->count == matches->capacity) {
        size_t capacity = matches->capacity ? 2 * matches->capacity : 256;
        wf_match *list = realloc(matches->list, capacity * sizeof *list);
        if (!list)
            return -1;
        matches->list = list;
        matches->capacity = capacity;
    }
    matches->list[matches->count++] = match;
    return 0;
}

/* How well a word fits another, from the product of their rows; not above 0: not at all. */
static float fit(const wf_words *words, size_t one, size_t other, int32_t product)
{
    float match = ((float)product * (words->scale[one] * words->scale[other]) - 0.3f) / 0.7f;
    return match < 1.0f ? match : 1.0f;
}

size_t wf_find_kindred(const wf_words *words, size_t number, wf_scan scan, int32_t *products, uint16_t *list)
{
    size_t found = 0;
    scan(words->rows, words->stride, words->rows + number * words->stride, words->count, products);
    for (size_t i = 0; i < words->count; i++)
        if (fit(words, i, number, products[i]) > 0.0f)
            list[found++] = (uint16_t)i;
    return found;
}

/* The words of the question: their rows, packed together, and marks of those that are worth a look. */
typedef struct {
    int8_t *rows;
    uint8_t *worth;            /* [words.count] */
    uint32_t term[WF_MOST_TERMS];
    size_t count;
} wf_asked;

static int take_words(const wf_ask *ask, wf_asked *asked)
{
    const wf_words *words = ask->words;
    *asked = (wf_asked){.rows = aligned_alloc(WF_ALIGNMENT, WF_MOST_TERMS * words->stride),
                        .worth = calloc(words->count, 1)};
    for (size_t t = 0; t < ask->terms && asked->rows && asked->worth; t++) {
        const wf_kindred *kindred = &ask->kindred[t];
        if (ask->numbers[t] >= words->count)
            continue;
        memcpy(asked->rows + asked->count * words->stride, words->rows + ask->numbers[t] * words->stride,
               words->stride);
        asked->term[asked->count++] = (uint32_t)t;
        for (size_t i = 0; i < kindred->count; i++)
            asked->worth[kindred->list[i]] = 1;
        if (!kindred->list)
            memset(asked->worth, 1, words->count);
    }
    return asked->rows && asked->worth ? 0 : -1;
}

static int match_kindred(const wf_ask *ask, const wf_asked *asked, const wf_term *term, wf_matches *matches)
{
    const wf_words *words = ask->words;
    int32_t products[WF_MOST_TERMS];
    ask->scan(asked->rows, words->stride, words->rows + term->word * words->stride, asked->count, products);
    for (size_t q = 0; q < asked->count; q++) {
        uint32_t t = asked->term[q];
        float match = fit(words, term->word, ask->numbers[t], products[q]);
        if (match > 0.0f && term->hash != ask->hashes[t] && keep(matches, (wf_match){term, t, match}))
            return -1;
    }
    return 0;
}

/* What the user's terms have in common with those of the question: 1 for the same stem, less for a kindred word. */
static int find_matches(const wf_ask *ask, wf_matches *matches)
{
    const wf_postings *postings = ask->postings;
    wf_asked asked;
    int failed = take_words(ask, &asked);
    for (size_t t = 0; t < ask->terms && !failed; t++) {
        const wf_term *same = wf_postings_find(postings, ask->hashes[t]);
        failed = same && keep(matches, (wf_match){same, (uint32_t)t, 1.0f});
    }
    for (size_t i = 0; asked.count && postings->slots && i <= postings->mask && !failed; i++) {
        const wf_term *term = &postings->slots[i];
        if (term->count && term->word < ask->words->count && asked.worth[term->word])
            failed = match_kindred(ask, &asked, term, matches);
    }
    free(asked.rows);
    free(asked.worth);
    return failed ? -1 : 0;
}

static void raise_to(float *values, uint32_t row, float value)
{
    if (value > values[row])
        values[row] = value;
}

/* The best match of the term at hand in each row, then what its neighbours lend it; returns the rows touched. */
static size_t spread(wf_work *work, const wf_matches *matches, uint32_t asked)
{
    size_t touched = 0;
    for (size_t i = 0; i < matches->count; i++) {
        const wf_match *match = &matches->list[i];
        const uint32_t *list = wf_list(match->term);
        for (uint32_t j = 0; match->asked == asked && j < match->term->count; j++) {
            uint32_t row = list[j] >> 8;
            if (row >= work->n || !work->visible[row])
                continue;
            if (work->match[row] == 0.0f)
                work->touched[touched++] = row;
            raise_to(work->match, row, match->match);
        }
    }
    for (size_t i = 0; i < touched; i++) {
        uint32_t row = work->touched[i], up = row, down = row;
        raise_to(work->best, row, work->match[row]);
        for (int k = 1; k <= NEAR; k++) {
            if (up != WF_NO_ROW && (up = work->before[up]) != WF_NO_ROW)
                raise_to(work->best, up, FALL[k] * work->match[row]);
            if (down != WF_NO_ROW && (down = work->after[down]) != WF_NO_ROW)
                raise_to(work->best, down, FALL[k] * work->match[row]);
        }
    }
    return touched;
}

static double idf(double all, double held)
{
    return log(1.0 + (all - held + 0.5) / (held + 0.5));
}

/* How many of the rows that may be seen hold a term. */
static double holding(const wf_work *work, const wf_term *term)
{
    const uint32_t *list = term ? wf_list(term) : NULL;
    uint32_t count = 0;
    for (uint32_t j = 0; list && j < term->count; j++)
        count += list[j] >> 8 < work->n && work->visible[list[j] >> 8];
    return count;
}

static void cover(wf_work *work, const wf_ask *ask, const wf_matches *matches, const double *weight, double total)
{
    for (size_t t = 0; t < ask->terms; t++) {
        size_t touched = spread(work, matches, (uint32_t)t);
        float share = (float)(weight[t] / total);
        for (size_t i = 0; i < work->n && touched; i++)
            work->part[WF_COVERAGE][i] += share * work->best[i];
        for (size_t i = 0; i < touched; i++) {
            uint32_t row = work->touched[i];
            work->own[row] += share * work->match[row];
            work->match[row] = 0.0f;
        }
        if (touched)
            memset(work->best, 0, work->n * sizeof *work->best);
    }
}

/* BM25 of each session as one text; `often` and `length` have room for one number a session. */
static void score_sessions(wf_work *work, const wf_ask *ask, const wf_matches *matches, double total,
                           uint32_t sessions, double *length, double *often, double *score)
{
    double all = 0.0, held = 0.0;
    for (size_t i = 0; i < work->n; i++)
        if (work->visible[i])
            length[work->session[i]] += ask->postings->lengths[i];
    for (uint32_t s = 0; s < sessions; s++)
        all += length[s], held += length[s] > 0.0;
    for (size_t m = 0; m < matches->count; m++) {
        const wf_match *match = &matches->list[m];
        const uint32_t *list = wf_list(match->term);
        double with = 0.0;
        if (match->term->hash != ask->hashes[match->asked])
            continue;
        memset(often, 0, sessions * sizeof *often);
        for (uint32_t j = 0; j < match->term->count; j++)
            if (list[j] >> 8 < work->n && work->visible[list[j] >> 8])
                often[work->session[list[j] >> 8]] += list[j] & 255;
        for (uint32_t s = 0; s < sessions; s++)
            with += often[s] > 0.0;
        for (uint32_t s = 0; s < sessions; s++)
            if (often[s] > 0.0)
                score[s] += idf(held, with) * often[s] / (often[s] + 1.2 * (0.5 + 0.5 * length[s] * held / all));
    }
    for (size_t i = 0; i < work->n; i++)
        work->part[WF_SESSION][i] = (float)(score[work->session[i]] / total);
}

static int match_words(wf_work *work, const wf_ask *ask, uint32_t sessions)
{
    wf_matches matches = {0};
    double weight[WF_MOST_TERMS], total = 0.0;
    double *length = calloc((size_t)sessions * 3 + 1, sizeof *length);
    int failed = !length || find_matches(ask, &matches);
    for (size_t t = 0; t < ask->terms && !failed; t++)
        total += weight[t] = idf(work->seen, holding(work, wf_postings_find(ask->postings, ask->hashes[t])));
    if (!failed) {
        cover(work, ask, &matches, weight, total);
        score_sessions(work, ask, &matches, total, sessions, length, length + sessions, length + 2 * sessions);
    }
    free(matches.list);
    free(length);
    return failed ? -1 : 0;
}

/* ---- vectors ---- */

/* What every row is compared with: the question less the mean, and the mean, both packed. */
typedef struct {
    int8_t *packed;            /* two rows */
    double by_query, by_mean;  /* their scales */
    double length;             /* of the question less the mean */
    double across;             /* its product with the mean */
    double mean_square;
} wf_compared;

static int take_aim(wf_compared *aim, const wf_ask *ask)
{
    size_t d = ask->rows.dimension, stride = ask->rows.stride;
    float *moved = malloc(d * sizeof *moved);
    *aim = (wf_compared){.packed = aligned_alloc(WF_ALIGNMENT, 2 * stride)};
    if (!moved || !aim->packed) {
        free(moved);
        return -1;
    }
    memset(aim->packed, 0, 2 * stride);
    for (size_t j = 0; j < d; j++) {
        moved[j] = ask->vector[j] - ask->mean[j];
        aim->mean_square += (double)ask->mean[j] * ask->mean[j];
        aim->across += (double)moved[j] * ask->mean[j];
        aim->length += (double)moved[j] * moved[j];
    }
    aim->length = sqrt(aim->length);
    aim->by_query = wf_pack(moved, d, aim->packed) * aim->length;
    aim->by_mean = wf_pack(ask->mean, d, aim->packed + stride) * sqrt(aim->mean_square);
    free(moved);
    return 0;
}

static void compare_rows(wf_work *work, const wf_ask *ask, const wf_compared *aim, size_t first, size_t count)
{
    const wf_rows *rows = &ask->rows;
    const int8_t *packed = rows->table->packed + first * rows->stride;
    int32_t with_query[CHUNK], with_mean[CHUNK];
    ask->scan(packed, rows->stride, aim->packed, count, with_query);
    ask->scan(packed, rows->stride, aim->packed + rows->stride, count, with_mean);
    for (size_t i = 0; i < count; i++) {
        double scale = rows->table->scale[first + i];
        double along = with_query[i] * scale * aim->by_query - aim->across;
        double apart = 1.0 - 2.0 * with_mean[i] * scale * aim->by_mean + aim->mean_square;
        if (work->visible[first + i] && scale > 0.0 && apart > CLOSE * CLOSE)
            work->part[WF_COSINE][first + i] = (float)fmax(-1.0, fmin(1.0, along / (sqrt(apart) * aim->length)));
    }
}

/* Cosines of the rows with the question, both less the rows' mean: (x - m)(q - m) / |x - m| |q - m|, |x| = 1. */
static int compare(wf_work *work, const wf_ask *ask)
{
    wf_compared aim;
    int failed = take_aim(&aim, ask);
    if (!failed && aim.length > CLOSE) {
        for (size_t first = 0; !ask->only && first < work->n; first += CHUNK)
            compare_rows(work, ask, &aim, first, work->n - first < CHUNK ? work->n - first : CHUNK);
        for (size_t i = 0; i < ask->only_count; i++)
            if (ask->only[i] < work->n)
                compare_rows(work, ask, &aim, ask->only[i], 1);
    }
    free(aim.packed);
    return failed;
}

/* ---- the other parts ---- */

static void add_around(wf_work *work)
{
    const float *cosine = work->part[WF_COSINE];
    float *around = work->part[WF_AROUND];
    for (size_t i = 0; i < work->n; i++) {
        uint32_t up = (uint32_t)i;
        for (int k = 1; work->visible[i] && k <= NEAR && (up = work->before[up]) != WF_NO_ROW; k++) {
            around[i] += FALL[k] * cosine[up];
            around[up] += FALL[k] * cosine[i];
        }
    }
}

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
    if (!ask->months || fabs(at) > 1e15)
        return 0.0f;
    calendar(at, &month, &day);
    if (!(ask->months >> month & 1))
        return 0.0f;
    return ask->days >> day & 1 ? 3.0f : 1.0f;
}

static void see_to_rows(wf_work *work, const wf_ask *ask)
{
    const wf_table *table = ask->rows.table;
    for (size_t i = 0; i < work->n; i++) {
        uint32_t one = work->before[i];
        uint16_t mark = table->mark[i];
        if (one != WF_NO_ROW && table->mark[one] & WF_ASKS)
            work->part[WF_REPLY][i] = work->own[one];
        work->part[WF_DATE][i] = named_date(ask, table->at[i]);
        if (ask->speaker != WF_NO_SPEAKER)
            work->part[WF_SPEAKER][i] = (mark & ~WF_ASKS) == ask->speaker ? 1.0f : -1.0f;
        work->part[WF_QUESTION][i] = mark & WF_ASKS ? 1.0f : 0.0f;
        if (ask->half_life > 0.0)
            work->part[WF_RECENCY][i] = (float)exp2(-fmax(0.0, ask->now - table->at[i]) / ask->half_life);
    }
}

static size_t best_rows(const wf_work *work, const wf_ask *ask)
{
    size_t size = 0;
    float *score = work->best;
    memset(score, 0, work->n * sizeof *score);
    for (size_t part = 0; part < WF_PARTS; part++)
        for (size_t i = 0; i < work->n; i++)
            score[i] += ask->weights[part] * work->part[part][i];
    for (size_t i = 0; i < work->n; i++)
        if (work->visible[i])
            size = wf_offer(ask->hits, size, ask->k, (wf_hit){(uint32_t)i, score[i]});
    wf_best_first(ask->hits, size);
    return size;
}

void wf_answer(wf_ask *ask)
{
    wf_work work;
    ask->found = ask->rows.count ? -1 : 0;
    if (!ask->rows.count)
        return;
    pthread_rwlock_rdlock(&ask->postings->lock);
    if (!make(&work, ask)) {
        uint32_t sessions = link_rows(&work, ask);
        int failed = ask->terms && match_words(&work, ask, sessions);
        pthread_rwlock_unlock(&ask->postings->lock);
        failed = failed || (ask->vector && compare(&work, ask));
        if (!failed) {
            add_around(&work);
            see_to_rows(&work, ask);
            ask->found = (ptrdiff_t)best_rows(&work, ask);
        }
        free(work.memory);
    } else {
        pthread_rwlock_unlock(&ask->postings->lock);
    }
}
