//! Lengths and angles of vectors on the host.

/// The dot product, summed in f64.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    (a.iter().zip(b))
        .map(|(&x, &y)| f64::from(x) * f64::from(y))
        .sum()
}

/// `a·b / (|a| |b|)`, 0 if either is zero.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
}

/// `a / |a|`; zero stays zero.
pub fn unit(a: &[f32]) -> Vec<f32> {
    let norm = a.iter().map(|x| x * x).sum::<f32>().sqrt();
    let norm = norm.max(f32::MIN_POSITIVE);
    a.iter().map(|x| x / norm).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn angles_do_not_depend_on_lengths() {
        assert!((cosine(&[3.0, 4.0], &[8.0, 6.0]) - 0.96).abs() < 1e-12);
        assert_eq!(cosine(&[0.0, 0.0], &[4.0, 3.0]), 0.0);
        assert_eq!(unit(&[3.0, 4.0]), [0.6, 0.8]);
        assert_eq!(unit(&[0.0, 0.0]), [0.0, 0.0]);
    }
}
