"""What the machine can do at most, in C where there is a compiler: reading memory, and multiplying int8."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from pathlib import Path
from typing import Any

PROBE = r"""
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#define WAYS 1
#define NAME "vpdpbusd, 512 bits"
typedef __m512i reg;
enum { OPS = 128 };
#define STEP(way, acc, a, b) acc = _mm512_dpbusd_epi32(acc, a, b)
#elif defined(__AVXVNNI__)
#define WAYS 1
#define NAME "vpdpbusd, 256 bits"
typedef __m256i reg;
enum { OPS = 64 };
#define STEP(way, acc, a, b) acc = _mm256_dpbusd_avx_epi32(acc, a, b)
#elif defined(__AVX2__)
#define WAYS 2
#define NAME "the faster of vpmaddwd on int16 and vpmaddubsw + vpmaddwd, with vpaddd"
typedef __m256i reg;
enum { OPS = 64 };
#define STEP(way, acc, a, b)                                                                    \
    acc = _mm256_add_epi32(acc, way ? _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), b)          \
                                    : _mm256_add_epi32(_mm256_madd_epi16(a, b), _mm256_madd_epi16(b, b)))
#endif
typedef uint64_t vec __attribute__((vector_size(32)));
static double read_rate(const vec *p, long n, int threads) {
    double started = omp_get_wtime();
    uint64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        long part = n / threads / 4 * 4, from = part * omp_get_thread_num();
        vec s[4] = {{0}};
        for (long i = from; i < from + part; i += 4)
            for (int j = 0; j < 4; j++) s[j] ^= p[i + j];
        s[0] ^= s[1] ^ s[2] ^ s[3];
        total += s[0][0] ^ s[0][1] ^ s[0][2] ^ s[0][3];
    }
    started = omp_get_wtime() - started;
    return total == 12345 ? 0 : n * 32.0 / started / 1e9;
}
static double int8_rate(int way, int threads) {
    const long loops = 8000000;
    double started = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    {
        reg a = {0}, b = {0}, acc[10] = {{0}};
        for (long i = 0; i < loops; i++)
            for (int j = 0; j < 10; j++) {
                STEP(way, acc[j], a, b);
                __asm__ volatile("" : "+v"(acc[j]), "+v"(a), "+v"(b));
            }
    }
    return 10.0 * OPS * loops * threads / (omp_get_wtime() - started) / 1e9;
}
int main(int argc, char **argv) {
    int threads = atoi(argv[1]);
    long n = 1L << 24; /* 512 MB */
    vec *p = aligned_alloc(64, n * sizeof(vec));
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < n; i++) p[i] = (vec){i, 1, 2, 3};
    double read = 0, peak = 0;
    for (int i = 0; i < 8; i++) { double r = read_rate(p, n, threads); if (r > read) read = r; }
    for (int i = 0; i < 3 * WAYS; i++) { double r = int8_rate(i % WAYS, threads); if (r > peak) peak = r; }
    printf("{\"read\": %f, \"peak\": %f, \"what\": \"int8: %s\"}", read, peak, NAME);
}
"""


def probe(task: dict[str, Any]) -> dict[str, Any]:
    """What the machine can do: GB/s of reading memory, and 1e9 int8 operations a second, from C where there is a compiler."""
    program = Path(task["folder"]) / "probe"
    program.unlink(missing_ok=True)
    command = ["cc", "-O3", "-march=native", "-fopenmp", "-x", "c", "-", "-o", str(program)]
    with contextlib.suppress(OSError):
        subprocess.run(command, input=PROBE, text=True, capture_output=True, check=False)
    if program.exists():
        out = subprocess.run([str(program), str(task["threads"])], capture_output=True, text=True, check=True).stdout
        return json.loads(out) | {"by": "C loops"}
    import torch

    torch.set_num_threads(task["threads"])
    buffer, square = torch.ones(1 << 28), torch.ones(1024, 1024)
    target = torch.empty_like(buffer)
    ways = [
        (buffer.nbytes, buffer.sum),
        (buffer.nbytes, buffer.amax),
        (2 * buffer.nbytes, lambda: target.copy_(buffer)),
    ]
    rates = [amount / fastest(call) / 1e9 for amount, call in ways]
    peak = 2 * 1024**3 / fastest(lambda: square @ square) / 1e9
    what = "no C compiler: torch's float32 matmul instead of an int8 peak"
    return {"read": max(rates), "peak": peak, "what": what, "by": "torch sum, amax and copy"}


def fastest(call: Any) -> float:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
