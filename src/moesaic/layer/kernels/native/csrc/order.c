/* Groups picks by expert without touching experts that have none. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FEW = 64 };

/* Sorts `picks` picks by expert, stable; those equal to `num_experts` are left out. Writes the picks of each row, the
 * experts that have rows in ascending order, and one past the last row of each. Returns their number, or -1 without
 * memory, or -2 for an index outside [0, num_experts]. */
long moesaic_order(const int64_t *index, long picks, long num_experts, int64_t *pick, int64_t *expert, int64_t *row_end) {
    for (long i = 0; i < picks; i++)
        if (index[i] < 0 || index[i] > num_experts) return -2;
    long rows = 0, groups = 0;
    if (picks <= FEW) {
        for (long i = 0; i < picks; i++) {
            if (index[i] == num_experts) continue;
            long at = rows++;
            for (; at > 0 && index[pick[at - 1]] > index[i]; at--) pick[at] = pick[at - 1];
            pick[at] = i;
        }
    } else {
        int64_t *next = calloc((size_t)num_experts + 1, sizeof *next);
        if (!next) return -1;
        for (long i = 0; i < picks; i++) next[index[i]]++;
        for (long e = 0; e < num_experts; e++) {
            long count = next[e];
            next[e] = rows;
            rows += count;
        }
        for (long i = 0; i < picks; i++)
            if (index[i] != num_experts) pick[next[index[i]]++] = i;
        free(next);
    }
    for (long row = 0; row < rows; row++) {
        int64_t e = index[pick[row]];
        if (groups == 0 || expert[groups - 1] != e) expert[groups++] = e;
        row_end[groups - 1] = row + 1;
    }
    return groups;
}
