/* Many questions on several threads: each takes the next question that nobody has taken. */
#include <stdatomic.h>

#include "recall.h"

#define MOST_THREADS 64

typedef struct {
    wf_ask *asks;
    size_t count;
    atomic_size_t next;
} wf_queue;

static void *work_off(void *given)
{
    wf_queue *queue = given;
    for (size_t i; (i = atomic_fetch_add(&queue->next, 1)) < queue->count;)
        wf_answer(&queue->asks[i]);
    return NULL;
}

void wf_answer_all(wf_ask *asks, size_t count, size_t threads)
{
    wf_queue queue = {asks, count, 0};
    pthread_t others[MOST_THREADS];
    size_t started = 0;
    while (started + 1 < threads && started < MOST_THREADS && !pthread_create(&others[started], NULL, work_off, &queue))
        started++; /* one that cannot be started leaves its share to the rest */
    work_off(&queue);
    while (started)
        pthread_join(others[--started], NULL);
}
