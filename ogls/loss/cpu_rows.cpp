// The row passes of ogls/loss/chunked.py for logits in fp32 and bf16, built by ogls/loss/cpu_rows.py. Sums are fp32 within a
// block and fp64 over blocks. Each row is widened into scratch memory that stays in a core's cache, and gone over 4 times:
//
//     1   maxima of z_S, z_T and u          3   summands and ph = p_S ds/dp_S, clipped, with their sums
//     2   p_S and both sums of exponentials 4   dD/dz = ph - p_S sum ph, over the logits
//
// A row that is not finite is left as it is, with value NaN. Minus infinity as a logit of both sides is a masked token.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr long WIDTH = 16;
#else
constexpr long WIDTH = 8;
#endif
constexpr long BLOCK = 256;  // sums of more in fp32 would be less exact than those of torch
constexpr float LARGE = 80;  // that of ogls/loss/divergence.py

typedef float Floats __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));
typedef uint16_t bf16;

Floats load(const float* from) { return *(const Floats*)from; }
Floats load(const bf16* from) { return (Floats)(__builtin_convertvector(*(const Halves*)from, Ints) << 16); }

void store(float* to, Floats x) { *(Floats*)to = x; }
void store(bf16* to, Floats x) {  // rounds to nearest, ties to even; x is finite
    Ints bits = (Ints)x;
    *(Halves*)to = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
}

// The same at the end of a row, where fewer than WIDTH entries may be left; beyond them stands `rest`.
template <class T> Floats load(const T* from, long left, T rest) {
    if (left >= WIDTH) return load(from);
    T entries[WIDTH];
    for (long i = 0; i < WIDTH; i++) entries[i] = i < left ? from[i] : rest;
    return load(entries);
}
template <class T> void store(T* to, Floats x, long left) {
    if (left >= WIDTH) return store(to, x);
    T entries[WIDTH];
    store(entries, x);
    std::copy(entries, entries + left, to);
}
float minus_infinity(const float*) { return -INFINITY; }
bf16 minus_infinity(const bf16*) { return 0xff80; }

// e^x to 1 in 10^7 for x < 88, 0 below -87: 2^n e^r with |r| <= ln 2 / 2 and e^r = 1 + r + r^2 (1/2 + r/6 + ...).
Floats exp(Floats x) {
    const float round = 12582912.0f;  // 1.5 * 2^23: the last bits of x + round are those of the nearest integer
    Floats shifted = x * 1.44269504f + round, n = shifted - round;
    Floats r = x - n * 6.93115234375e-1f - n * 3.19461850e-5f;  // the first product is exact
    Floats y = r * 1.38146462e-3f + 8.36871009e-3f;
    y = y * r + 4.16683867e-2f;
    y = y * r + 1.66665207e-1f;
    y = y * r + 4.99999935e-1f;
    y = y * (r * r) + r + 1.0f;
    return x < -87.0f ? Floats{} : y * (Floats)(((Ints)shifted << 23) + 0x3f800000);
}

// log x for normal x > 0: n ln 2 + log(1 + m) with 1 + m between the roots of 1/2 and 2; exactly 0 at 1.
Floats log(Floats x) {
    const int32_t root = 0x3f3504f3;
    Ints bits = (Ints)x - root;
    Floats n = __builtin_convertvector(bits >> 23, Floats), m = (Floats)((bits & 0x7fffff) + root) - 1.0f;
    Floats y = m * 8.73487218e-2f - 1.43075345e-1f;
    y = y * m + 1.49179683e-1f;
    y = y * m - 1.65705059e-1f;
    y = y * m + 1.99620725e-1f;
    y = y * m - 2.50017554e-1f;
    y = y * m + 3.33339502e-1f;
    y = y * m - 4.99999916e-1f;
    return n * 3.19461850e-5f + y * (m * m) + m + n * 6.93115234375e-1f;
}

float largest(Floats x) {
    float top = x[0];
    for (long i = 1; i < WIDTH; i++) top = std::max(top, x[i]);
    return top;
}
double sum(Floats x) {
    double total = 0;
    for (long i = 0; i < WIDTH; i++) total += x[i];
    return total;
}

enum Kind { FORWARD_KL, REVERSE_KL, JENSEN_SHANNON, SKEW_KL };

struct Options {
    float weight, temperature, low, high;  // summands are clamped to low .. high
    int32_t wants_gradient;
};

// s and ph as `terms` of ogls/loss/divergence.py makes them
template <Kind KIND> void terms(Floats ps, Floats pt, Floats u, float weight, Floats& s, Floats& ph) {
    if (KIND == FORWARD_KL) {
        s = pt * u;
        ph = -pt;
    } else if (KIND == REVERSE_KL) {
        s = -ps * u;
        ph = s + ps;
    } else {
        Floats low = u > LARGE ? Floats{} + LARGE : u;
        Floats ratio = 1.0f + weight * (exp(low) - 1.0f), k = log(ratio) + (u - low);
        if (weight == 0) k = Floats{};
        if (KIND == JENSEN_SHANNON) {
            ph = (weight - 1) * ps * k;
            s = weight * pt * (u - k) + ph;
        } else {
            ph = (weight - 1) * pt / ratio;
            s = pt * (u - k);
        }
    }
}

template <Kind KIND, class T>
void row(T* logits, const T* gaps, float* value, const int64_t* id, float* logprob, long vocab, Options o) {
    const long size = (vocab + WIDTH - 1) / WIDTH * WIDTH;
    thread_local std::vector<float> scratch;
    scratch.resize(3 * size);
    float *const ps = scratch.data(), *const us = ps + size, *const pts = us + size;
    const float scale = 1 / o.temperature;
    auto z_at = [=](long i) { return load(logits + i, vocab - i, minus_infinity(logits)) * scale; };
    auto u_at = [=](long i) { return load(gaps + i, vocab - i, T(0)) * scale; };
    *value = NAN;
    if (logprob && (*id < 0 || *id >= vocab)) return;

    Floats tops = Floats{} - INFINITY, target_tops = tops;
    for (long i = 0; i < size; i += WIDTH) {
        Floats z = z_at(i), y = z + u_at(i);
        tops = z > tops ? z : tops;
        target_tops = y > target_tops ? y : target_tops;
    }
    const float top = largest(tops), shift = largest(target_tops) - top;

    double mass_s = 0, mass_t = 0;
    for (long from = 0; from < size; from += BLOCK) {
        Floats sum_s{}, sum_t{};
        for (long i = from; i < std::min(size, from + BLOCK); i += WIDTH) {
            Floats z = z_at(i) - top, u = u_at(i), p = exp(z), q = exp(z + u - shift);
            sum_s += p;
            sum_t += q;
            store(ps + i, p), store(pts + i, q), store(us + i, u);
        }
        mass_s += sum(sum_s), mass_t += sum(sum_t);
    }
    const float of_ps = 1 / mass_s, of_pt = 1 / mass_t, of_u = shift + std::log(mass_t) - std::log(mass_s);

    double total = 0, total_ph = 0;
    for (long from = 0; from < size; from += BLOCK) {
        Floats sum_of{}, sum_ph{};
        for (long i = from; i < std::min(size, from + BLOCK); i += WIDTH) {
            Floats s, ph;
            terms<KIND>(load(ps + i) * of_ps, load(pts + i) * of_pt, load(us + i) - of_u, o.weight, s, ph);
            ph = (s > o.high) | (s < o.low) ? Floats{} : ph;
            s = s > o.high ? Floats{} + o.high : s;
            s = s < o.low ? Floats{} + o.low : s;
            sum_of += s;
            sum_ph += ph;
            store(pts + i, ph);
        }
        total += sum(sum_of), total_ph += sum(sum_ph);
    }
    if (!std::isfinite(total)) return;
    if (logprob) *logprob = load(logits + *id, 1, T(0))[0] * scale - top - std::log(mass_s);
    *value = total;
    if (!o.wants_gradient) return;
    const float all = total_ph / mass_s;
    for (long i = 0; i < size; i += WIDTH) store(logits + i, load(pts + i) - load(ps + i) * all, vocab - i);
}

template <Kind KIND, class T>
void rows(T* logits, const T* gaps, float* values, const int64_t* ids, float* logprobs, long count, long vocab, Options o) {
    for (long r = 0; r < count; r++)
        row<KIND>(logits + r * vocab, gaps + r * vocab, values + r, ids ? ids + r : nullptr,
                  logprobs ? logprobs + r : nullptr, vocab, o);
}

template <class T, class... Arguments> void of_kind(int kind, Arguments... arguments) {
    switch (kind) {
        case FORWARD_KL: return rows<FORWARD_KL, T>(arguments...);
        case REVERSE_KL: return rows<REVERSE_KL, T>(arguments...);
        case JENSEN_SHANNON: return rows<JENSEN_SHANNON, T>(arguments...);
        case SKEW_KL: return rows<SKEW_KL, T>(arguments...);
    }
}

}  // namespace

extern "C" void rows_float32(int kind, float* logits, const float* gaps, float* values, const int64_t* ids,
                             float* logprobs, long count, long vocab, const Options* options) {
    of_kind<float>(kind, logits, gaps, values, ids, logprobs, count, vocab, *options);
}
extern "C" void rows_bfloat16(int kind, bf16* logits, const bf16* gaps, float* values, const int64_t* ids,
                              float* logprobs, long count, long vocab, const Options* options) {
    of_kind<bf16>(kind, logits, gaps, values, ids, logprobs, count, vocab, *options);
}
