//! Results whose gradient is given by a closure.

use std::sync::Arc;

#[cfg(all(feature = "gpu", not(test)))]
use burn::backend::Cube;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Backend, DispatchKindConversion, DispatchTensor, Flex};
use burn::tensor::Tensor;

/// Computes `forward` of the inputs without autodiff. If an input is tracked, records the closure it
/// returns, which maps the result's gradient to those of the inputs.
///
/// All inputs must be on the back end of a tensor that is [`available`](super::available) or
/// [`differentiable`](super::differentiable).
pub(super) fn with_gradient<const N: usize, const D: usize, const R: usize, F>(
    inputs: [Tensor<D>; N],
    forward: impl FnOnce([Tensor<D>; N]) -> (Tensor<R>, F),
) -> Tensor<R>
where
    F: Fn(Tensor<R>) -> [Tensor<D>; N] + Send + Sync + 'static,
{
    if !inputs.iter().any(Tensor::is_tracked) {
        return forward(inputs.map(Tensor::without_autodiff)).0;
    }
    #[cfg(all(feature = "gpu", not(test)))]
    if !inputs.iter().all(super::on_cpu) {
        return record::<Cube, N, D, R, F>(inputs, forward);
    }
    record::<Flex, N, D, R, F>(inputs, forward)
}

/// [`with_gradient`] on the back end `B`.
fn record<B, const N: usize, const D: usize, const R: usize, F>(
    inputs: [Tensor<D>; N],
    forward: impl FnOnce([Tensor<D>; N]) -> (Tensor<R>, F),
) -> Tensor<R>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>,
    F: Fn(Tensor<R>) -> [Tensor<D>; N] + Send + Sync + 'static,
{
    #[expect(clippy::expect_used, reason = "checked by all callers")]
    let primitives = inputs.map(|input| {
        input
            .autodiff()
            .try_into_primitive::<Autodiff<B>>()
            .expect("a tensor of the back end")
    });
    let guards = primitives.each_ref().map(|primitive| primitive.node());
    let inputs =
        primitives.map(|primitive| Tensor::from_primitive::<B>(primitive.into_primitive()));
    let (output, backward) = forward(inputs);
    #[expect(
        clippy::expect_used,
        reason = "results are where the tensors are that they were made from"
    )]
    let output = output
        .try_into_primitive::<B>()
        .expect("a tensor of the back end");
    let prepared = Custom::<D, R>
        .prepare::<NoCheckpointing>(guards)
        .compute_bound()
        .stateful();
    Tensor::from_primitive::<Autodiff<B>>(match prepared {
        OpsKind::Tracked(prepared) => prepared.finish(Closure(Arc::new(backward)), output),
        OpsKind::UnTracked(prepared) => prepared.finish(output),
    })
}

/// `run` of the inputs, without keeping intermediate results for the backward pass: that runs it once
/// more, and its gradient is that of `sum(run(inputs) · grad)`.
///
/// All inputs must be [`differentiable`](super::differentiable).
pub fn recomputed<const N: usize>(
    inputs: [Tensor<4>; N],
    run: impl Fn([Tensor<4>; N]) -> Tensor<4> + Send + Sync + 'static,
) -> Tensor<4> {
    let tracked = inputs.each_ref().map(Tensor::is_tracked);
    with_gradient(inputs, |inputs| {
        let output = run(inputs.clone());
        let backward = move |grad: Tensor<4>| {
            let mut leaves = inputs.clone();
            for (leaf, tracked) in leaves.iter_mut().zip(tracked) {
                if tracked {
                    *leaf = leaf.clone().autodiff().require_grad();
                }
            }
            let gradients = (run(leaves.clone()) * grad).sum().backward();
            let mut grads = leaves;
            for ((grad, input), tracked) in grads.iter_mut().zip(&inputs).zip(tracked) {
                *grad = match tracked.then(|| grad.grad(&gradients)).flatten() {
                    Some(grad) => grad,
                    None => input.zeros_like(),
                };
            }
            grads
        };
        (output, backward)
    })
}

/// As [`recomputed`], of tokens `[b, n, d]`. Just `run(x)` if nothing tracks `x`, or it cannot be differentiated so.
pub fn recomputed_tokens(
    x: Tensor<3>,
    run: impl Fn(Tensor<3>) -> Tensor<3> + Send + Sync + 'static,
) -> Tensor<3> {
    if !x.is_tracked() || !super::differentiable(&x) {
        return run(x);
    }
    let [b, n, d] = x.dims();
    let output = recomputed([x.reshape([b, 1, n, d])], move |[x]| {
        run(x.reshape([b, n, d])).reshape([b, 1, n, d])
    });
    output.reshape([b, n, d])
}

/// The backward step that calls a [`Closure`].
#[derive(Debug)]
struct Custom<const D: usize, const R: usize>;

/// Maps the gradient of a result to those of the inputs.
#[derive(Clone)]
struct Closure<const N: usize, const D: usize, const R: usize>(
    Arc<dyn Fn(Tensor<R>) -> [Tensor<D>; N] + Send + Sync>,
);

impl<const N: usize, const D: usize, const R: usize> std::fmt::Debug for Closure<N, D, R> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Closure")
    }
}

impl<B, const N: usize, const D: usize, const R: usize> Backward<B, N> for Custom<D, R>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = Closure<N, D, R>;

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let gradient = gradients.consume::<B>(&ops.node);
        let Closure(closure) = ops.state;
        let input_gradients = closure(Tensor::from_primitive::<B>(gradient));
        for (parent, gradient) in ops.parents.into_iter().zip(input_gradients) {
            let gradient = gradient.try_into_primitive::<B>();
            if let (Some(parent), Ok(gradient)) = (parent, gradient) {
                gradients.register::<B>(parent.id, gradient);
            }
        }
    }
}
