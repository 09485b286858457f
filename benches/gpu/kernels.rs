//! Kernels on a GPU, by themselves: every way there is to do them, at the shapes of the U-Nets.
//!
//! ```text
//! step kernels launch|memory|layers|matmul|conv [--device vulkan|webgpu] [--seconds 0.05] [--scale 1]
//! ```
//!
//! Prints a line of JSON for each: what, seconds, TFLOP/s, GB/s, relative error against f32.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use burn::backend::Cube;
use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_cubecl::kernel::conv::{ConvStrategy, conv_forward_nhwc};
use burn_cubecl::kernel::matmul::{MatmulStrategy, matmul};
use burn_cubecl::tensor::CubeTensor;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::multi_level::Strategy;
use cubek::matmul::multi_level::components::tile::TileMatmulKind;
use cubek::matmul::multi_level::routines::batch::{
    double_buffering::DoubleBufferingArgs, ordered_double_buffering::OrderedSelectionArgs,
    simple::SimpleArgs,
};
use cubek::matmul::routine::BlueprintStrategy::Inferred;
use cubek::std::InputBinding;

struct Bench {
    device: Device,
    seconds: f64,
    scale: usize,
}

/// Measures the groups that are named.
pub(crate) fn run(arguments: &[String]) {
    let flag = |name: &str| {
        let place = arguments.iter().position(|flag| flag == name)?;
        arguments.get(place + 1).cloned()
    };
    let device = match flag("--device").as_deref() {
        #[cfg(feature = "vulkan")]
        Some("vulkan") => Device::vulkan(Default::default()),
        #[cfg(feature = "webgpu")]
        Some("webgpu") => Device::wgpu(Default::default()),
        _ => {
            println!(
                "usage: step kernels GROUP… --device vulkan|webgpu, as far as they are built in"
            );
            return;
        }
    };
    let bench = Bench {
        device,
        seconds: flag("--seconds").map_or(0.05, |text| text.parse().expect("seconds")),
        scale: flag("--scale").map_or(1, |text| text.parse().expect("a number")),
    };
    for group in arguments.iter().take_while(|word| !word.starts_with("--")) {
        match group.as_str() {
            "launch" => bench.launch(),
            "memory" => bench.memory(),
            "matmul" => bench.matmul(),
            "conv" => bench.conv(),
            "layers" => bench.layers(),
            other => println!("no group {other}"),
        }
    }
}

fn primitive<const D: usize>(x: &Tensor<D>) -> CubeTensor {
    x.clone().try_into_primitive::<Cube>().expect("on the GPU")
}

fn tensor<const D: usize>(x: CubeTensor) -> Tensor<D> {
    Tensor::from_primitive::<Cube>(x)
}

impl Bench {
    fn random<const D: usize>(&self, shape: [usize; D], dtype: DType) -> Tensor<D> {
        Tensor::<D>::random(shape, Distribution::Normal(0.0, 1.0), &self.device).cast(dtype)
    }

    /// Times `run` and prints it; one warm call compiles, and is held against `reference`.
    fn time<const D: usize>(
        &self,
        what: &str,
        flops: f64,
        bytes: f64,
        reference: Option<&Tensor<D>>,
        run: impl Fn() -> Result<Tensor<D>, String>,
    ) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let began = Instant::now();
            let first = run()?;
            self.device.sync().map_err(|e| format!("{e:?}"))?;
            let first_seconds = began.elapsed().as_secs_f64();
            let error = reference.map_or(0.0, |reference| {
                let x = first.cast(DType::F32);
                let difference = (x - reference.clone()).square().sum().sqrt();
                let size = reference.clone().square().sum().sqrt();
                (difference / size).into_scalar::<f32>()
            });
            drop(run()?);
            self.device.sync().map_err(|e| format!("{e:?}"))?;
            let (mut times, all) = (Vec::new(), Instant::now());
            let mut count = 1;
            while all.elapsed().as_secs_f64() < self.seconds || times.len() < 3 {
                let began = Instant::now();
                for _ in 0..count {
                    drop(run()?);
                }
                self.device.sync().map_err(|e| format!("{e:?}"))?;
                let seconds = began.elapsed().as_secs_f64();
                times.push(seconds / f64::from(count));
                if seconds < self.seconds / 5.0 {
                    count *= 2;
                    times.clear();
                }
            }
            times.sort_by(f64::total_cmp);
            Ok::<_, String>((times[times.len() / 2], first_seconds, error))
        }));
        match outcome {
            Ok(Ok((seconds, first, error))) => println!(
                "{{\"what\": \"{what}\", \"ms\": {:.4}, \"tflops\": {:.1}, \"gbs\": {:.0}, \
                 \"first_ms\": {:.0}, \"error\": {error:.1e}}}",
                seconds * 1e3,
                flops / seconds / 1e12,
                bytes / seconds / 1e9,
                first * 1e3,
            ),
            Ok(Err(error)) => {
                let error: String = error
                    .chars()
                    .filter(|c| *c != '"' && *c != '\n')
                    .take(150)
                    .collect();
                println!("{{\"what\": \"{what}\", \"failed\": \"{error}\"}}");
            }
            Err(_) => println!("{{\"what\": \"{what}\", \"failed\": \"panic\"}}"),
        }
    }

    fn launch(&self) {
        let x = self.random([64], DType::F32);
        self.time("add of 64 numbers", 0.0, 0.0, None, || Ok(x.clone() + 1.0));
        let x = self.random([64], DType::F32).autodiff().require_grad();
        self.time("add of 64 numbers, tracked", 0.0, 0.0, None, || {
            Ok(x.clone() + 1.0)
        });
    }

    fn memory(&self) {
        let scale = self.scale;
        for dtype in [DType::F32, DType::F16] {
            let x = self.random([2, 4096 / scale, 320], dtype);
            let n = x.shape().num_elements() as f64 * dtype.size() as f64;
            let name = |what: &str| format!("{what} [2, 4096, 320] {dtype:?}");
            self.time(&name("add"), 0.0, 3.0 * n, None, || {
                Ok(x.clone() + x.clone())
            });
            self.time(&name("cast to f32"), 0.0, 0.0, None, || {
                Ok(x.clone().cast(DType::F32))
            });
            self.time(&name("sum_dim 2"), 0.0, n, None, || {
                Ok(x.clone().sum_dim(2))
            });
            self.time(&name("sum_dim 1"), 0.0, n, None, || {
                Ok(x.clone().sum_dim(1))
            });
            let w = self.random([320], dtype);
            self.time(&name("layer_norm"), 0.0, 2.0 * n, None, || {
                Ok(burn::tensor::module::layer_norm(
                    x.clone(),
                    w.clone(),
                    Some(w.clone()),
                    1e-5,
                ))
            });
            let y = self.random([2, 320, 4096 / scale], dtype);
            self.time(&name("transpose copy"), 0.0, 2.0 * n, None, || {
                Ok(y.clone().swap_dims(1, 2) + 1.0)
            });
            let s = self.random([16, 4096 / scale, 4096 / scale], dtype);
            let n = s.shape().num_elements() as f64 * dtype.size() as f64;
            self.time(
                &format!("softmax [16, 4096, 4096] {dtype:?}"),
                0.0,
                2.0 * n,
                None,
                || Ok(burn::tensor::activation::softmax(s.clone(), 2)),
            );
            self.time(
                &format!("add [16, 4096, 4096] {dtype:?}"),
                0.0,
                2.0 * n,
                None,
                || Ok(s.clone() + 1.0),
            );
        }
    }

    fn matmul(&self) {
        let s = self.scale;
        let shapes: [(usize, usize, usize, usize); 9] = [
            (1, 4096, 4096, 4096),
            (1, 8192, 320, 320),
            (1, 8192, 320, 2560),
            (1, 2048, 640, 640),
            (1, 2048, 640, 5120),
            (1, 512, 1280, 1280),
            (1, 8192, 2880, 320),
            (16, 4096, 40, 4096),
            (16, 4096, 4096, 40),
        ];
        for (b, m, k, n) in shapes {
            let (m, k, n) = (m / s, k.div_ceil(s), n / s);
            let flops = 2.0 * (b * m * k * n) as f64;
            let x = self.random([b, m, k], DType::F32);
            let w = self.random([b, n, k], DType::F32);
            let exact = x.clone().matmul(w.clone().swap_dims(1, 2));
            let bytes = 2.0 * (b * (m * k + k * n + m * n)) as f64;
            for (layout, transposed) in [("xWt", true), ("xW", false)] {
                let name = |what: &str| format!("matmul {layout} [{b}, {m}, {k}, {n}] {what}");
                let right = |dtype: DType| {
                    let w = w.clone().cast(dtype).swap_dims(1, 2);
                    if transposed { w } else { w + 0.0 }
                };
                let (x16, w16) = (x.clone().cast(DType::F16), right(DType::F16));
                let w32 = right(DType::F32);
                self.time(
                    &name("f32 default"),
                    flops,
                    2.0 * bytes,
                    Some(&exact),
                    || Ok(x.clone().matmul(w32.clone())),
                );
                self.time(&name("f16 default"), flops, bytes, Some(&exact), || {
                    Ok(x16.clone().matmul(w16.clone()))
                });
                self.time(&name("f16 auto"), flops, bytes, Some(&exact), || {
                    matmul(
                        primitive(&x16),
                        primitive(&w16),
                        None,
                        MatmulStrategy::Cube,
                        DType::F16,
                    )
                    .map(tensor)
                    .map_err(|e| format!("{e:?}"))
                });
                if b == 1 && !transposed {
                    continue;
                }
                for (what, strategy) in strategies() {
                    self.time(
                        &name(&format!("f16 {what}")),
                        flops,
                        bytes,
                        Some(&exact),
                        || {
                            let (x, w) = (primitive(&x16), primitive(&w16));
                            let out = Tensor::<3>::empty([b, m, n], (&self.device, DType::F16));
                            let out = primitive(&out);
                            let f16 = burn_cubecl::cubecl::ir::ElemType::Float(
                                burn_cubecl::cubecl::ir::FloatKind::F16,
                            );
                            let mut elems = MatmulElems::from_globals(&MatmulGlobalElems {
                                lhs: f16,
                                rhs: f16,
                                out: f16,
                            });
                            let client = x.client.clone();
                            cubek::matmul::launch::launch_ref(
                                &strategy.clone().into(),
                                &client,
                                InputBinding::new(x.binding(), f16),
                                InputBinding::new(w.binding(), f16),
                                out.clone().binding(),
                                &mut elems,
                            )
                            .map_err(|e| format!("{e:?}"))?;
                            Ok(tensor(out))
                        },
                    );
                }
            }
        }
    }

    fn conv(&self) {
        use burn::tensor::ops::ConvOptions;
        use cubek::convolution::{AcceleratedTileKind, ConvAlgorithm};
        let s = self.scale;
        for (side, c_in, c_out) in [
            (64, 320, 320),
            (64, 640, 320),
            (32, 640, 640),
            (16, 1280, 1280),
            (8, 1280, 1280),
            (64, 4, 320),
            (64, 320, 4),
        ] {
            let (c_in, c_out) = ((c_in / s).max(4), (c_out / s).max(4));
            let side = side / s.min(4);
            let flops = 2.0 * (2 * side * side * 9 * c_in * c_out) as f64;
            let bytes = 2.0 * (2 * side * side * (c_in + c_out) + 9 * c_in * c_out) as f64;
            let x = self.random([2, side, side, c_in], DType::F32);
            // [c_out, kh, kw, c_in]
            let w = self.random([c_out, 3, 3, c_in], DType::F32);
            let options = || ConvOptions::new([1, 1], [1, 1], [1, 1], 1);
            let forward = |x: &Tensor<4>, w: &Tensor<4>, strategy: ConvStrategy| {
                conv_forward_nhwc::<2>(primitive(x), primitive(w), None, options(), strategy)
                    .map(tensor::<4>)
                    .map_err(|e| format!("{e:?}"))
            };
            let Ok(exact) = forward(&x, &w, ConvStrategy::Direct) else {
                continue;
            };
            let name = |what: &str| format!("conv [2, {side}, {side}, {c_in} -> {c_out}] {what}");
            let [x16, w16] = [x.clone(), w.clone()].map(|x| x.cast(DType::F16));
            self.time(
                &name("f32 direct"),
                flops,
                2.0 * bytes,
                Some(&exact),
                || forward(&x, &w, ConvStrategy::Direct),
            );
            self.time(
                &name("f32 implicit"),
                flops,
                2.0 * bytes,
                Some(&exact),
                || forward(&x, &w, ConvStrategy::ImplicitGemm),
            );
            self.time(&name("f16 direct"), flops, bytes, Some(&exact), || {
                forward(&x16, &w16, ConvStrategy::Direct)
            });
            // Weights as they are stored: [kh, kw, c_in, c_out]
            let stored = w16.clone().permute([1, 2, 3, 0]) + 0.0;
            let stored = stored.permute([3, 0, 1, 2]);
            for tile_kind in [AcceleratedTileKind::Cmma] {
                for algorithm in [
                    ConvAlgorithm::SimpleSyncCyclic,
                    ConvAlgorithm::SimpleSyncTilewise,
                ] {
                    for (layout, w) in [("OHWI", &w16), ("HWIO", &stored)] {
                        self.time(
                            &name(&format!("f16 {algorithm}_{tile_kind} {layout}")),
                            flops,
                            bytes,
                            Some(&exact),
                            || self.conv_with(&x16, w, algorithm, tile_kind),
                        );
                    }
                }
            }
            // Neighbourhoods gathered, then one product.
            let w2 = w16.clone().reshape([1, c_out, 9 * c_in]).swap_dims(1, 2);
            self.time(
                &name("f16 gathered, product"),
                flops,
                bytes,
                Some(&exact),
                || {
                    let x = x16.clone().pad([(0, 0), (1, 1), (1, 1), (0, 0)], 0.0);
                    let taps = (0..9)
                        .map(|tap| {
                            x.clone().slice([
                                0..2,
                                tap / 3..tap / 3 + side,
                                tap % 3..tap % 3 + side,
                            ])
                        })
                        .collect();
                    let x = Tensor::cat(taps, 3).reshape([1, 2 * side * side, 9 * c_in]);
                    Ok(x.matmul(w2.clone()).reshape([2, side, side, c_out]))
                },
            );
        }
    }

    fn conv_with(
        &self,
        x: &Tensor<4>,
        w: &Tensor<4>,
        algorithm: cubek::convolution::ConvAlgorithm,
        tile_kind: cubek::convolution::AcceleratedTileKind,
    ) -> Result<Tensor<4>, String> {
        use cubek::convolution::{ConvolutionArgs, ConvolutionInputs, Strategy, launch_ref};
        let [b, h, width, _] = x.dims();
        let out = primitive(&Tensor::<4>::empty(
            [b, h, width, w.dims()[0]],
            (&self.device, DType::F16),
        ));
        let f16 = burn_cubecl::cubecl::ir::ElemType::Float(burn_cubecl::cubecl::ir::FloatKind::F16);
        let elems = MatmulElems::from_globals(&MatmulGlobalElems {
            lhs: f16,
            rhs: f16,
            out: f16,
        });
        let (x, w) = (primitive(x), primitive(w));
        let client = x.client.clone();
        launch_ref::<2>(
            &Strategy::Inferred {
                algorithm,
                tile_kind,
            },
            &client,
            ConvolutionInputs::Forward {
                input: InputBinding::new(x.binding(), f16),
                weight: InputBinding::new(w.binding(), f16),
                bias: None,
                out: out.clone().binding(),
            },
            ConvolutionArgs {
                stride: [1, 1],
                padding: [1, 1],
                dilation: [1, 1],
            },
            elems,
        )
        .map_err(|e| format!("{e:?}"))?;
        Ok(tensor(out))
    }

    /// The layers of this crate, forward and backward.
    fn layers(&self) {
        use difference_inversion::models::layers::{Mask, gated_gelu, multi_head_attention};
        let s = self.scale;
        for dtype in [DType::F16, DType::F32] {
            let both = |what: &str,
                        flops: f64,
                        inputs: Vec<Tensor<3>>,
                        run: &dyn Fn(&[Tensor<3>]) -> Tensor<3>| {
                let name = format!("{what} {dtype:?}");
                self.time(&name, flops, 0.0, None, || Ok(run(&inputs)));
                self.time(&format!("{name}, both ways"), 0.0, 0.0, None, || {
                    let leaves: Vec<_> = inputs
                        .iter()
                        .map(|x| x.clone().autodiff().require_grad())
                        .collect();
                    let y = run(&leaves);
                    let grads = y.sum().backward();
                    leaves[0]
                        .grad(&grads)
                        .ok_or_else(|| "no gradient".to_owned())
                });
            };
            for (n, m, d) in [
                (4096usize, 4096usize, 40usize),
                (1024, 1024, 80),
                (256, 256, 160),
                (4096, 77, 40),
                (4096, 4096, 64),
            ] {
                let (n, m) = (n / s, m.div_ceil(s));
                let inputs = [n, m, m]
                    .map(|n| self.random([2, n, 8 * d], dtype))
                    .to_vec();
                both(
                    &format!("attention [16, {n}, {m}, {d}]"),
                    4.0 * (16 * n * m * d) as f64,
                    inputs,
                    &|x| {
                        multi_head_attention(
                            x[0].clone(),
                            x[1].clone(),
                            x[2].clone(),
                            8,
                            Mask::None,
                        )
                    },
                );
            }
            let x = self.random([2, 4096 / s, 2560], dtype);
            both("gated GELU [2, 4096, 2560]", 0.0, vec![x], &|x| {
                gated_gelu(x[0].clone())
            });
        }
    }
}

fn strategies() -> Vec<(&'static str, Strategy)> {
    let tile_matmul = TileMatmulKind::Cmma;
    let simple = |multi_rows| {
        Inferred(SimpleArgs {
            multi_rows,
            tile_matmul,
        })
    };
    let double = |specialized| {
        Inferred(DoubleBufferingArgs {
            specialized,
            tile_matmul,
        })
    };
    let ordered = |row_count| {
        Inferred(OrderedSelectionArgs {
            partition_k: Some(2),
            row_count: Some(row_count),
            rows_per_plane: Some(2),
            tile_matmul,
        })
    };
    vec![
        ("simple cmma", Strategy::SimpleCyclicCmma(simple(false))),
        ("simple cmma rows", Strategy::SimpleCyclicCmma(simple(true))),
        ("double cmma", Strategy::DoubleCyclicCmma(double(false))),
        (
            "double cmma specialized",
            Strategy::DoubleCyclicCmma(double(true)),
        ),
        ("ordered 4 cmma", Strategy::OrderedDoubleCmma(ordered(4))),
        ("ordered 8 cmma", Strategy::OrderedDoubleCmma(ordered(8))),
    ]
}
