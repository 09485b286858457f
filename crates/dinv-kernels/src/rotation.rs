//! Rotary positions on the CPU ([Su et al. 2021](https://arxiv.org/abs/2104.09864)).

use burn::tensor::Tensor;

use super::gradient::with_gradient;
use super::{Kernel, Values, for_chunks, tensor, zeros};

/// Rotates pairs of numbers of every head by the angles of their token. Tokens after the last with an angle stay
/// unchanged.
///
/// Pairs are neighbours or, if `halves`, of one number of a head's first half and one of its second.
///
/// # Shapes
/// `x` `[b, n, heads · 2 · count]`, `cos` and `sin` `[places, count]`.
pub fn rotate(x: Tensor<3>, [cos, sin]: [Tensor<2>; 2], halves: bool) -> Tensor<3> {
    with_gradient([x], |[x]| {
        let shape @ [b, n, c] = x.dims();
        let [places, count] = cos.dims();
        let (x, cos, sin) = (Values::of(x), Values::of(cos), Values::of(sin));
        let run = move |x: &[f32], direction: f32| {
            let mut out = zeros(b * n * c);
            let kernel = Rotate {
                x,
                cos: cos.as_slice(),
                sin: sin.as_slice(),
                direction,
                size: [n, places, count],
                halves,
            };
            for_chunks(&mut out, c, &kernel);
            tensor(out, shape)
        };
        let out = run(x.as_slice(), 1.0);
        let backward = move |grad: Tensor<3>| [run(Values::of(grad).as_slice(), -1.0)];
        (out, backward)
    })
}

struct Rotate<'a> {
    x: &'a [f32],
    cos: &'a [f32],
    sin: &'a [f32],
    /// 1, or −1 to rotate back.
    direction: f32,
    /// Tokens, those with angles, angles of each.
    size: [usize; 3],
    halves: bool,
}

impl Kernel for Rotate<'_> {
    #[inline(always)]
    fn run(&self, row: usize, out: &mut [f32]) {
        let [n, places, count] = self.size;
        let x = &self.x[row * out.len()..][..out.len()];
        let place = row % n;
        if place >= places {
            out.copy_from_slice(x);
            return;
        }
        let cos = &self.cos[place * count..][..count];
        let sin = &self.sin[place * count..][..count];
        let heads = x.chunks_exact(2 * count);
        for (out, x) in out.chunks_exact_mut(2 * count).zip(heads) {
            if self.halves {
                let ((first, second), (a, b)) = (out.split_at_mut(count), x.split_at(count));
                for i in 0..count {
                    let sin = sin[i] * self.direction;
                    first[i] = a[i] * cos[i] - b[i] * sin;
                    second[i] = b[i] * cos[i] + a[i] * sin;
                }
            } else {
                let ((out, _), (x, _)) = (out.as_chunks_mut::<2>(), x.as_chunks::<2>());
                for i in 0..count {
                    let ([a, b], sin) = (x[i], sin[i] * self.direction);
                    out[i] = [a * cos[i] - b * sin, b * cos[i] + a * sin];
                }
            }
        }
    }
}
