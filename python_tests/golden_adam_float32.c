EVK_CLONES void adam(void *p_tensor, const void *g_tensor, void *m_tensor,
                       void *v_tensor, int64_t n, const double *scalars) {
    float *restrict p_ = p_tensor;
    const float *restrict g_ = g_tensor;
    float *restrict m_ = m_tensor;
    float *restrict v_ = v_tensor;
    const float k0 = (float)scalars[0]; /* 1 - beta1 */
    const float k1 = (float)scalars[1]; /* beta1 */
    const float k2 = (float)scalars[2]; /* 1 - beta2 */
    const float k3 = (float)scalars[3]; /* beta2 */
    const float k4 = (float)scalars[4]; /* weight of p */
    const float k5 = (float)scalars[5]; /* weight of m / (sqrt(v) + 1) */
    const float k6 = (float)scalars[6]; /* weight of sqrt(v) in / (sqrt(v) + 1) */
    const float k7 = (float)scalars[7]; /* weight of 1 in / (sqrt(v) + 1) */
    for (int64_t i = 0; i < n; ++i) {
        const float p = load_float32(p_[i]);
        const float g = load_float32(g_[i]);
        const float m = m_[i];
        const float v = v_[i];
        const float t0 = k1 * m;
        const float t1 = fmaf(k0, g, t0);
        const float t2 = k2 * g;
        const float t3 = k3 * v;
        const float t4 = fmaf(t2, g, t3);
        const float t5 = k4 != 0 ? k4 * p : 0;
        const float t6 = k5 != 0 ? k5 * t1 : 0;
        const float t7 = sqrtf(t4);
        const float t8 = fmaf(k6, t7, k7);
        const float t9 = t6 / t8;
        const float t10 = t5 + t9;
        const float t11 = p - t10;
        p_[i] = store_float32(t11);
        m_[i] = t1;
        v_[i] = t4;
    }
}
