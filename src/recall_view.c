#include "recall_view.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define COLUMNS 6 /* of floats, by place */
#define MARGIN 4  /* places, at least WF_NEAR */

static int number_sessions(wf_view *view)
{
    const wf_ask *ask = view->ask;
    const wf_table *table = ask->rows.table;
    size_t n = view->rows;
    int always = ask->since == -INFINITY && ask->until == INFINITY;
    uint32_t *at = malloc((4 * n + 1) * sizeof *at);
    view->of_rows = at;
    if (!at)
        return -1;
    view->place = at, view->session = at + n, view->start = at + 2 * n, view->end = at + 3 * n;
    for (size_t i = 0; i < n; i++) {
        uint32_t scope = table->scope[i], previous = table->previous[i];
        int seen = scope < ask->scopes && ask->allowed[scope] &&
                   (always || (table->at[i] >= ask->since && table->at[i] <= ask->until));
        if (previous == WF_NO_ROW)
            view->end[view->sessions++] = 0;
        view->session[i] = previous == WF_NO_ROW ? (uint32_t)view->sessions - 1 : view->session[previous];
        view->place[i] = seen ? view->end[view->session[i]]++ : WF_NOWHERE; /* in its session, so far */
        view->seen += (size_t)seen;
    }
    return 0;
}

static int lay_out(wf_view *view)
{
    size_t places = 0;
    for (size_t s = 0; s < view->sessions; s++) {
        size_t count = view->end[s];
        view->start[s] = (uint32_t)places;
        view->end[s] = (uint32_t)(places + count);
        places += count ? count + WF_NEAR : 0;
    }
    view->blocks = (places + WF_BLOCK - 1) / WF_BLOCK;
    places = view->blocks * WF_BLOCK;
    size_t column = places + 2 * MARGIN;
    float *at = calloc(COLUMNS * column * sizeof *at + places * sizeof *view->row + view->blocks + 2, 1);
    view->of_places = at;
    if (!at)
        return -1;
    float **columns[COLUMNS] = {&view->match, &view->coverage, &view->own,
                                &view->session_fit, &view->cosine, &view->asks};
    for (size_t c = 0; c < COLUMNS; c++, at += column)
        *columns[c] = at + MARGIN;
    view->row = (uint32_t *)at;
    memset(view->row, 0xff, places * sizeof *view->row);
    view->touched = (uint8_t *)(view->row + places);
    return 0;
}

int wf_see(wf_view *view, const wf_ask *ask)
{
    *view = (wf_view){.ask = ask, .rows = ask->rows.count};
    if (number_sessions(view) || lay_out(view))
        return -1;
    for (size_t i = 0; i < view->rows; i++) {
        if (view->place[i] == WF_NOWHERE)
            continue;
        uint32_t place = view->place[i] += view->start[view->session[i]];
        view->row[place] = (uint32_t)i;
        view->asks[place] = ask->rows.table->mark[i] & WF_ASKS ? 1.0f : 0.0f;
    }
    return 0;
}

void wf_view_free(wf_view *view)
{
    free(view->of_rows);
    free(view->of_places);
}
