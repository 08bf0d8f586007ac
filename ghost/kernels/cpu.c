/* A weight gradient and every sample's inner products with validation gradients, in one pass on a CPU.

   A sample's gradient is left^T right, [m, n], summed over its tokens. Tile by tile it is formed in registers,
   as any matrix product is, and stays there until it has been multiplied with each target and added to the
   total: docs/kernel.md. Compiled by ghost/kernels/cpu.py, which sets, for the processor's vectors,

     LANES  numbers in a vector
     ROWS   rows of a tile; with its two vectors of columns it fills the registers

   A block is some tiles' rows and columns. One thread takes all samples through it, so that the block's targets
   and totals, and each sample's factors, stay in that core's second-level cache.

   Scores of Adam's own step weigh the targets by slopes that depend on the whole gradient and on its samples'
   squares. There a block keeps its samples' gradients until it has the slopes. */

#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define COLUMNS (2 * LANES)
#define TILE (ROWS * COLUMNS)
#define TILES_DOWN (196 / ROWS) /* of a block, at most */
#define TILES_ACROSS (256 / COLUMNS)
#define MOST_TILES (TILES_DOWN * TILES_ACROSS)
#define HELD (2 << 20) /* bytes of a block's samples, where they are kept */
#define PACKING 8 /* products in the time that one number of a factor is packed in */
#define TOKENS 512 /* that factors are packed for at once; a sample's further tokens are added like a sample's */

typedef float vec __attribute__((vector_size(4 * LANES)));

typedef struct {
    const float *data; /* [samples, tokens, width], the last axis contiguous */
    long samples, tokens, width, sample_stride, token_stride;
} Factor;

typedef struct {
    long row, rows, column, columns; /* of the matrix */
} Block;

typedef struct {
    float *left, *right;    /* one sample's factors, [tiles, TOKENS, ROWS] and [tiles, TOKENS, COLUMNS] */
    float *total, *targets; /* [tiles across, tiles down, TILE], and as many for each target */
    float *squares;         /* as many, where samples are kept, */
    float *samples;         /* and as many for each sample */
    vec *lanes;             /* [targets], or where samples are kept [samples, targets] */
    double *dots;           /* [targets] of one sample */
} Space;

typedef struct {
    long down, across; /* tiles of a block, at most */
    long rows, columns; /* of blocks */
} Grid;

static long over(long a, long b) { return (a + b - 1) / b; }
static long least(long a, long b) { return a < b ? a : b; }

/* `width` columns of `tokens` rows, in strips of `strip` columns that lie token after token. */
static inline __attribute__((always_inline)) void pack(const float *from, long stride, long tokens, long width,
                                                       long strip, float *to)
{
    long whole = width / strip, rest = width % strip;
    for (long t = 0; t < tokens; t++, from += stride) {
        for (long s = 0; s < whole; s++)
            memcpy(to + (s * tokens + t) * strip, from + s * strip, 4 * strip);
        if (rest) {
            float *last = to + (whole * tokens + t) * strip;
            memcpy(last, from + whole * strip, 4 * rest);
            memset(last + rest, 0, 4 * (strip - rest));
        }
    }
}

/* One part of a sample's tokens, packed for a block; their number. */
static long pack_part(Factor left, Factor right, long sample, long part, Block block, Space space)
{
    long parts = over(left.tokens, TOKENS), first = left.tokens * part / parts;
    long tokens = left.tokens * (part + 1) / parts - first;
    const float *l = left.data + sample * left.sample_stride + first * left.token_stride + block.row;
    const float *r = right.data + sample * right.sample_stride + first * right.token_stride + block.column;
    pack(l, left.token_stride, tokens, block.rows, ROWS, space.left);
    pack(r, right.token_stride, tokens, block.columns, COLUMNS, space.right);
    return tokens;
}

/* One tile of a sample's gradient, of the packed tokens. */
static inline void multiply(const float *left, const float *right, long tokens, vec tile[ROWS][2])
{
    vec sum[ROWS][2] = {0};
    for (long t = 0; t < tokens; t++, left += ROWS, right += COLUMNS) {
        vec first = *(const vec *)right, second = *(const vec *)(right + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            sum[r][0] += left[r] * first;
            sum[r][1] += left[r] * second;
        }
    }
    memcpy(tile, sum, sizeof sum);
}

static inline void add(vec tile[ROWS][2], float *total)
{
    vec *to = (vec *)total;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        to[2 * r] += tile[r][0];
        to[2 * r + 1] += tile[r][1];
    }
}

/* A tile's inner product with a target's, each lane for itself. */
static inline vec dot(vec tile[ROWS][2], const float *target)
{
    const vec *with = (const vec *)target;
    vec first = {0}, second = {0};
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        first += tile[r][0] * with[2 * r];
        second += tile[r][1] * with[2 * r + 1];
    }
    return first + second;
}

static double lanes_sum(vec lanes)
{
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++)
        sum += lanes[lane];
    return sum;
}

/* Add one sample's gradient in a block to `total`, and its inner products with `targets` to `space.dots`. */
static void take_sample(Factor left, Factor right, long sample, Block block, long targets, float *total, Space space)
{
    long down = over(block.rows, ROWS), across = over(block.columns, COLUMNS), tiles = down * across * TILE;
    for (long part = 0; part < over(left.tokens, TOKENS); part++) {
        long tokens = pack_part(left, right, sample, part, block, space);
        for (long j = 0; j < across; j++) {
            memset(space.lanes, 0, targets * sizeof(vec));
            for (long i = 0; i < down; i++) {
                vec tile[ROWS][2];
                long at = (j * down + i) * TILE;
                multiply(space.left + i * tokens * ROWS, space.right + j * tokens * COLUMNS, tokens, tile);
                for (long c = 0; c < targets; c++)
                    space.lanes[c] += dot(tile, space.targets + c * tiles + at);
                add(tile, total + at);
            }
            for (long c = 0; c < targets; c++)
                space.dots[c] += lanes_sum(space.lanes[c]);
        }
    }
}

/* Write one sample's gradient in a block down. */
static void keep_sample(Factor left, Factor right, long sample, Block block, float *kept, Space space)
{
    long down = over(block.rows, ROWS), across = over(block.columns, COLUMNS), parts = over(left.tokens, TOKENS);
    if (!parts)
        memset(kept, 0, 4 * down * across * TILE);
    for (long part = 0; part < parts; part++) {
        long tokens = pack_part(left, right, sample, part, block, space);
        for (long j = 0; j < across; j++)
            for (long i = 0; i < down; i++) {
                vec tile[ROWS][2];
                long at = (j * down + i) * TILE;
                multiply(space.left + i * tokens * ROWS, space.right + j * tokens * COLUMNS, tokens, tile);
                if (part)
                    add((vec(*)[2])(kept + at), (float *)tile);
                memcpy(kept + at, tile, sizeof tile);
            }
    }
}

/* A block of a matrix with rows of `stride` numbers, in tiles; zeros beyond its edges. */
static void read_block(const float *from, long stride, Block block, float *tiles)
{
    long down = over(block.rows, ROWS), across = over(block.columns, COLUMNS);
    memset(tiles, 0, 4 * down * across * TILE);
    for (long i = 0; i < block.rows; i++)
        for (long j = 0; j < across; j++)
            memcpy(tiles + ((j * down + i / ROWS) * ROWS + i % ROWS) * COLUMNS,
                   from + (block.row + i) * stride + block.column + j * COLUMNS,
                   4 * least(COLUMNS, block.columns - j * COLUMNS));
}

static void write_block(const float *tiles, long stride, Block block, float *to)
{
    long down = over(block.rows, ROWS), across = over(block.columns, COLUMNS);
    for (long i = 0; i < block.rows; i++)
        for (long j = 0; j < across; j++)
            memcpy(to + (block.row + i) * stride + block.column + j * COLUMNS,
                   tiles + ((j * down + i / ROWS) * ROWS + i % ROWS) * COLUMNS,
                   4 * least(COLUMNS, block.columns - j * COLUMNS));
}

/* What a block takes of a token, in products: its tiles', and the packing of its factors. */
static long work(long down, long across)
{
    return down * across * TILE + PACKING * (down * ROWS + across * COLUMNS);
}

/* Blocks of `most` tiles that pack little, and of which each thread has as many. */
static Grid grid_of(long m, long n, long most, long threads)
{
    Grid best = {0};
    long lowest = LONG_MAX;
    for (long down = least(TILES_DOWN, over(m, ROWS)); down > 0; down--)
        for (long across = least(TILES_ACROSS, over(n, COLUMNS)); across > 0; across--) {
            if (down * across > (most > 1 ? most : 1))
                continue;
            Grid grid = {down, across, over(m, down * ROWS), over(n, across * COLUMNS)};
            long cost = over(grid.rows * grid.columns, threads) * work(down, across);
            if (cost < lowest) {
                lowest = cost;
                best = grid;
            }
        }
    return best;
}

static Block block_at(Grid grid, long m, long n, long number)
{
    long row = number % grid.rows * grid.down * ROWS, column = number / grid.rows * grid.across * COLUMNS;
    Block block = {row, least(grid.down * ROWS, m - row), column, least(grid.across * COLUMNS, n - column)};
    return block;
}

/* Space for one thread in one piece of memory, which the caller frees; its `left` is NULL if there is none.
   `kept` is the number of samples that are kept. */
static Space space_for(Grid grid, long tokens, long targets, long kept)
{
    long held = least(tokens, TOKENS), tiles = grid.down * grid.across * TILE;
    long left = over(grid.down * ROWS * held, LANES) * LANES, right = grid.across * COLUMNS * held;
    long blocks = (2 + targets + kept) * tiles, lanes = targets * (kept > 1 ? kept : 1);
    Space space;
    space.left = aligned_alloc(64, over(4 * (left + right + blocks + lanes * LANES + 2 * targets), 64) * 64);
    space.right = space.left + left;
    space.total = space.right + right;
    space.squares = space.total + tiles;
    space.targets = space.squares + tiles;
    space.samples = space.targets + targets * tiles;
    space.lanes = (vec *)(space.samples + kept * tiles);
    space.dots = (double *)(space.lanes + lanes);
    return space;
}

static Grid grid_of_sums(long m, long n, long targets, long threads)
{
    return grid_of(m, n, targets > 2 ? MOST_TILES / 2 : MOST_TILES, threads);
}

static Grid grid_of_steps(long m, long n, long samples, long threads)
{
    return grid_of(m, n, least(MOST_TILES, HELD / (4 * TILE) / (samples > 1 ? samples : 1)), threads);
}

/* How many blocks `sum_and_dots` takes for a matrix [m, n]. */
long count_blocks(long m, long n, long targets, long threads)
{
    Grid grid = grid_of_sums(m, n, targets, threads);
    return grid.rows * grid.columns;
}

/* How many blocks `adam_sum_and_dots` takes. */
long count_step_blocks(long m, long n, long samples, long threads)
{
    Grid grid = grid_of_steps(m, n, samples, threads);
    return grid.rows * grid.columns;
}

/* Fill `total` [m, n] with the sum of all samples' gradients, and `dots` [blocks, samples, targets] with their
   inner products in each block: added up in the order of blocks they are the same bits each time.

   Target c is `targets` [targets, m, n], or where that is NULL the sum of the gradients of the next sizes[c]
   samples of val_left, val_right. Returns 0, or 1 if there was no memory. */
int sum_and_dots(Factor left, Factor right, const float *targets, Factor val_left, Factor val_right,
                 const long *sizes, long count, long threads, float *total, double *dots)
{
    long m = left.width, n = right.width;
    Grid grid = grid_of_sums(m, n, count, threads);
    int failed = 0;
    if (least(m, n) == 0)
        return 0;
#pragma omp parallel num_threads(least(threads, grid.rows * grid.columns))
    {
        Space space = space_for(grid, left.tokens > val_left.tokens ? left.tokens : val_left.tokens, count, 0);
        if (!space.left) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (long number = 0; number < grid.rows * grid.columns; number++) {
            if (!space.left)
                continue;
            Block block = block_at(grid, m, n, number);
            long tiles = over(block.rows, ROWS) * over(block.columns, COLUMNS) * TILE, sample = 0;
            for (long c = 0; c < count; c++) {
                float *target = space.targets + c * tiles;
                if (targets) {
                    read_block(targets + c * m * n, n, block, target);
                    continue;
                }
                memset(target, 0, 4 * tiles);
                for (long end = sample + sizes[c]; sample < end; sample++)
                    take_sample(val_left, val_right, sample, block, 0, target, space);
            }
            memset(space.total, 0, 4 * tiles);
            for (long s = 0; s < left.samples; s++) {
                memset(space.dots, 0, 8 * count);
                take_sample(left, right, s, block, count, space.total, space);
                memcpy(dots + (number * left.samples + s) * count, space.dots, 8 * count);
            }
            write_block(space.total, n, block, total);
        }
        free(space.left);
    }
    return failed;
}

typedef struct {
    float carried, slope, kept, fresh, eps, decay, reach;
    const float *m, *v, *p, *before; /* [m, n]; p and before may be NULL */
    float *squares;                  /* [m, n], added to; NULL where before is */
} Adam;

typedef struct {
    const long *row, *sample; /* [count], ascending, and no row twice for a sample */
    const float *values;      /* [count, n] */
    long count;
} Lookups;

/* The chord's slope of Adam's update over the range that a batch covers: ghost.preconditioner.slope. */
static inline float slope(Adam adam, float grad, float square, float m, float v, float p)
{
    float ends = grad + 2 * adam.decay * p; /* f + n */
    float most = grad * grad > square ? grad * grad : square;
    float width = copysignf(sqrtf(most), ends); /* f - n */
    float near = (ends - width) / 2, far = (ends + width) / 2, kept = adam.kept * v;
    float root_near = sqrtf(kept + adam.fresh * (near * near));
    float root_far = sqrtf(kept + adam.fresh * (far * far));
    float bend = (adam.carried * m + adam.slope * near) * ends / (root_near + root_far + FLT_MIN);
    float denominator = root_near + adam.eps;
    return (adam.slope * denominator - adam.fresh * bend) / (denominator * (root_far + adam.eps));
}

/* Where a block's row and column are in its tiles. */
static long place(Block block, long row, long column)
{
    return (column / COLUMNS * over(block.rows, ROWS) * ROWS + row) * COLUMNS + column % COLUMNS;
}

/* What looks up rows of the block is a part of its samples' gradients: add it to their sum and their squares. */
static void add_lookups(Lookups lookups, Block block, long n, long tiles, Space space)
{
    for (long e = 0; e < lookups.count; e++)
        for (long c = 0; c < block.columns; c++) {
            long at = place(block, lookups.row[e] - block.row, c);
            float g = space.samples[lookups.sample[e] * tiles + at];
            float value = lookups.values[e * n + block.column + c];
            space.total[at] += value;
            space.squares[at] += (2 * g + value) * value;
        }
}

/* Their inner products with the block's targets, added to `dots` [samples, targets]. */
static void dot_lookups(Lookups lookups, Block block, long n, long tiles, const float *targets, long count,
                        double *dots)
{
    for (long e = 0; e < lookups.count; e++)
        for (long t = 0; t < count; t++) {
            float sum = 0;
            for (long c = 0; c < block.columns; c++)
                sum += lookups.values[e * n + block.column + c]
                       * targets[t * tiles + place(block, lookups.row[e] - block.row, c)];
            dots[lookups.sample[e] * count + t] += sum;
        }
}

/* Those of the block's rows. */
static Lookups lookups_in(Lookups lookups, Block block, long n)
{
    long first = 0, last;
    while (first < lookups.count && lookups.row[first] < block.row)
        first++;
    for (last = first; last < lookups.count && lookups.row[last] < block.row + block.rows;)
        last++;
    Lookups found = {lookups.row + first, lookups.sample + first, lookups.values + first * n, last - first};
    return found;
}

/* Add all samples' gradients in one tile to `total`, and their squares to `squares`. */
static void add_moments(const float *samples, long count, long stride, vec *total, vec *squares)
{
    for (int k = 0; k < 2 * ROWS; k++) {
        vec sum = total[k], square = squares[k];
        for (long s = 0; s < count; s++) {
            vec g = *(const vec *)(samples + s * stride + k * LANES);
            sum += g;
            square += g * g;
        }
        total[k] = sum;
        squares[k] = square;
    }
}

/* The slopes of `width` weights from number `at` of the matrix on; the step's squares so far go to `adam`. */
static inline __attribute__((always_inline)) void take_slopes(Adam adam, long at, long width,
                                                              const float *restrict total,
                                                              const float *restrict squares,
                                                              float *restrict slopes)
{
    static const float zeros[COLUMNS];
    const float *m = adam.m + at, *v = adam.v + at, *p = adam.p ? adam.p + at : zeros;
    const float *before = adam.before ? adam.before + at : zeros;
    float square[COLUMNS];
    memcpy(square, squares, sizeof square);
    if (adam.squares) {
        for (long c = 0; c < width; c++)
            square[c] += adam.squares[at + c];
        memcpy(adam.squares + at, square, 4 * width);
    }
    for (long c = 0; c < width; c++)
        slopes[c] = slope(adam, (total[c] + before[c]) * adam.reach, square[c] * adam.reach, m[c], v[c], p[c]);
}

/* Weigh one tile of the targets, which begins at a row and a column of the matrix. Beyond the block's edges,
   where no weights are, targets are zeros and stay so. */
static void weigh(Adam adam, long n, long row, long rows, long column, long columns, const float *total,
                  const float *squares, float *targets, long count, long stride)
{
    for (long r = 0; r < rows; r++) {
        float slopes[COLUMNS];
        long at = (row + r) * n + column;
        if (columns == COLUMNS)
            take_slopes(adam, at, COLUMNS, total + r * COLUMNS, squares + r * COLUMNS, slopes);
        else
            take_slopes(adam, at, columns, total + r * COLUMNS, squares + r * COLUMNS, slopes);
        for (long t = 0; t < count; t++)
            for (long c = 0; c < columns; c++)
                targets[t * stride + r * COLUMNS + c] *= slopes[c];
    }
}

/* The total, the weighed targets and the dots of a block whose samples are kept, tile by tile. */
static void settle_block(Adam adam, Block block, long n, long samples, long count, Space space)
{
    long down = over(block.rows, ROWS), across = over(block.columns, COLUMNS), tiles = down * across * TILE;
    memset(space.lanes, 0, samples * count * sizeof(vec));
    for (long j = 0; j < across; j++)
        for (long i = 0; i < down; i++) {
            long at = (j * down + i) * TILE, row = i * ROWS, column = j * COLUMNS;
            add_moments(space.samples + at, samples, tiles, (vec *)(space.total + at), (vec *)(space.squares + at));
            weigh(adam, n, block.row + row, least(ROWS, block.rows - row), block.column + column,
                  least(COLUMNS, block.columns - column), space.total + at, space.squares + at,
                  space.targets + at, count, tiles);
            for (long s = 0; s < samples; s++)
                for (long c = 0; c < count; c++)
                    space.lanes[s * count + c] +=
                        dot((vec(*)[2])(space.samples + s * tiles + at), space.targets + c * tiles + at);
        }
}

/* `sum_and_dots` with each target weighed by the slopes of Adam's update, which the gradient's whole sum and its
   samples' squares determine. What looks the matrix's rows up beside the factors is a part of both; its inner
   products go to `lookup_dots` [blocks, samples, targets], which is zeros before. */
int adam_sum_and_dots(Factor left, Factor right, const float *targets, long count, Adam adam, Lookups lookups,
                      long threads, float *total, double *dots, double *lookup_dots)
{
    long m = left.width, n = right.width, b = left.samples;
    Grid grid = grid_of_steps(m, n, b, threads);
    int failed = 0;
    if (least(m, n) == 0)
        return 0;
#pragma omp parallel num_threads(least(threads, grid.rows * grid.columns))
    {
        Space space = space_for(grid, left.tokens, count, b);
        if (!space.left) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (long number = 0; number < grid.rows * grid.columns; number++) {
            if (!space.left)
                continue;
            Block block = block_at(grid, m, n, number);
            long tiles = over(block.rows, ROWS) * over(block.columns, COLUMNS) * TILE;
            Lookups inside = lookups_in(lookups, block, n);
            for (long c = 0; c < count; c++)
                read_block(targets + c * m * n, n, block, space.targets + c * tiles);
            for (long s = 0; s < b; s++)
                keep_sample(left, right, s, block, space.samples + s * tiles, space);
            memset(space.total, 0, 4 * tiles);
            memset(space.squares, 0, 4 * tiles);
            add_lookups(inside, block, n, tiles, space);
            settle_block(adam, block, n, b, count, space);
            for (long k = 0; k < b * count; k++)
                dots[number * b * count + k] = lanes_sum(space.lanes[k]);
            dot_lookups(inside, block, n, tiles, space.targets, count, lookup_dots + number * b * count);
            write_block(space.total, n, block, total);
        }
        free(space.left);
    }
    return failed;
}
