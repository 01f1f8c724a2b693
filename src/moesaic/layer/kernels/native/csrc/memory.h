/* Large buffers. A fresh one costs a page fault for each 4 KiB, more than what is written to it; on huge pages it costs
 * almost nothing. */
#ifndef MOESAIC_MEMORY_H
#define MOESAIC_MEMORY_H

/* 64-byte aligned memory for free(), or NULL. */
void *moesaic_allocate(long bytes);

/* Asks for huge pages in memory that has not been touched yet, wherever it comes from. */
void moesaic_huge_pages(void *memory, long bytes);

#endif
