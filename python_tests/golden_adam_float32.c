EVK_CLONES void adam(void *const *tensors, int64_t n, const double *scalars) {
    float *restrict p_ = tensors[EVK_P];
    const float *restrict g_ = tensors[EVK_G];
    float *restrict m_ = tensors[EVK_M];
    float *restrict v_ = tensors[EVK_V];
    const float k0 = (float)scalars[0]; /* gradient_factor */
    const float k1 = (float)scalars[1]; /* 1 - beta1 */
    const float k2 = (float)scalars[2]; /* beta1 */
    const float k3 = (float)scalars[3]; /* 1 - beta2 */
    const float k4 = (float)scalars[4]; /* beta2 */
    const float k5 = (float)scalars[5]; /* weight of p */
    const float k6 = (float)scalars[6]; /* weight of m / (sqrt(v) + 1) */
    const float k7 = (float)scalars[7]; /* weight of sqrt(v) in / (sqrt(v) + 1) */
    const float k8 = (float)scalars[8]; /* weight of 1 in / (sqrt(v) + 1) */
    const float k9 = (float)scalars[9]; /* -1 * lr */
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float p = load_float32(p_[i]);
        const float g = load_float32(g_[i]);
        const float m = load_float32(m_[i]);
        const float v = load_float32(v_[i]);
        const float t0 = k0 * g;
        const float t1 = k2 * m;
        const float t2 = fmaf(k1, t0, t1);
        const float t3 = k3 * t0;
        const float t4 = k4 * v;
        const float t5 = fmaf(t3, t0, t4);
        const float t6 = k6 != 0 ? k6 * t2 : 0;
        const float t7 = sqrtf(t5);
        const float t8 = fmaf(k7, t7, k8);
        const float t9 = t6 / t8;
        const float t10 = k5 != 0 ? fmaf(k5, p, t9) : t9;
        const float t11 = fmaf(k9, t10, p);
        p_[i] = store_float32(t11);
        m_[i] = store_float32(t2);
        v_[i] = store_float32(t5);
    }
}
