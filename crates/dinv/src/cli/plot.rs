//! `loss.png`: the loss and its terms, step by step.

use difference_inversion::util::progress::LossTerms;
use image::{Rgb, RgbImage};

use super::canvas::{ACCENT, Canvas, GREY, INK, RULE, bold, regular};

/// One line of a panel: a value per step.
pub(crate) struct Curve {
    pub(crate) name: String,
    pub(crate) values: Vec<f64>,
}

/// A coordinate system with its curves.
pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) curves: Vec<Curve>,
}

/// The whole figure: the first panel is large, the others are in a column to its right.
pub(crate) struct Plot {
    pub(crate) title: String,
    pub(crate) subtitle: String,
    /// Step of the first value.
    pub(crate) first_step: usize,
    pub(crate) panels: Vec<Panel>,
    /// The step whose tokens were kept, marked in every panel.
    pub(crate) chosen_step: Option<usize>,
}

const WIDTH: u32 = 1280;
const HEIGHT: u32 = 680;
const COLOURS: [Rgb<u8>; 3] = [ACCENT, Rgb([207, 96, 0]), Rgb([26, 127, 55])];
/// Share of the steps, before and after each step, that the bold line averages over.
const SMOOTHING: f64 = 0.03;

/// A panel's place on the canvas.
#[derive(Clone, Copy)]
struct Frame {
    left: f32,
    top: f32,
    right: f32,
    bottom: f32,
}

/// The figure of a learning run: the total loss and its terms.
pub(crate) fn of_learning(history: &[LossTerms], best_step: usize) -> Plot {
    let curve = |name: &str, term: fn(&LossTerms) -> f32| Curve {
        name: name.to_owned(),
        values: history.iter().map(|terms| term(terms).into()).collect(),
    };
    let panel = |title: &str, curves| Panel {
        title: title.to_owned(),
        curves,
    };
    // A term without weight is not computed.
    let has = |term: fn(&LossTerms) -> f32| history.iter().any(|terms| term(terms) != 0.0);
    let mut panels = vec![panel(
        "Total loss",
        vec![curve("total", |terms| terms.total)],
    )];
    let mut subtitle = "Pale: every step; bold: the running mean.".to_owned();
    if has(|terms| terms.after) {
        let curves = vec![
            curve("after", |terms| terms.after),
            curve("before", |terms| terms.before),
        ];
        panels.push(panel("Token consistency loss", curves));
        let terms = "after: the prompt of A with the difference explains A′; before: the prompt of A′ without it \
                     explains A.";
        subtitle = format!("{terms} {subtitle}");
    }
    if has(|terms| terms.clip) {
        panels.push(panel("CLIP loss", vec![curve("clip", |terms| terms.clip)]));
    }
    Plot {
        title: "Learning the difference".into(),
        subtitle,
        first_step: 1,
        chosen_step: Some(best_step),
        panels,
    }
}

/// Draws the figure.
pub(crate) fn draw(plot: &Plot) -> anyhow::Result<RgbImage> {
    let mut canvas = Canvas::new(WIDTH, HEIGHT)?;
    canvas.text(&plot.title, 40.0, 28.0, bold(24.0, INK));
    canvas.text(&plot.subtitle, 40.0, 62.0, regular(14.5, GREY));

    let whole = Frame {
        left: 40.0,
        top: 104.0,
        right: 1240.0,
        bottom: 648.0,
    };
    let Some((first, others)) = plot.panels.split_first() else {
        return Ok(canvas.into_image());
    };
    let divide = if others.is_empty() {
        whole.right
    } else {
        752.0
    };
    draw_panel(
        &mut canvas,
        plot,
        first,
        Frame {
            right: divide,
            ..whole
        },
    );
    let gap = 40.0;
    let count = count(others.len());
    let height = (whole.bottom - whole.top + gap) / count.max(1.0) - gap;
    let mut top = whole.top;
    for panel in others {
        let frame = Frame {
            left: divide + 48.0,
            top,
            right: whole.right,
            bottom: top + height,
        };
        draw_panel(&mut canvas, plot, panel, frame);
        top += height + gap;
    }
    Ok(canvas.into_image())
}

fn draw_panel(canvas: &mut Canvas, plot: &Plot, panel: &Panel, frame: Frame) {
    canvas.text(&panel.title, frame.left, frame.top, bold(16.0, INK));
    draw_legend(canvas, panel, frame);

    let (low, high) = value_range(panel);
    let value_ticks = ticks(low, high, 5);
    let step = tick_step(low, high, 5);
    let labels: Vec<String> = value_ticks
        .iter()
        .map(|value| tick_label(*value, step))
        .collect();
    let label_style = regular(13.0, GREY);
    let label_width = labels
        .iter()
        .map(|label| canvas.text_width(label, label_style))
        .fold(0.0, f32::max);
    let axes = Frame {
        left: frame.left + label_width + 10.0,
        top: frame.top + 34.0,
        right: frame.right,
        bottom: frame.bottom - 40.0,
    };
    let steps = panel
        .curves
        .iter()
        .map(|curve| curve.values.len())
        .max()
        .unwrap_or(0);
    let last_step = plot.first_step + steps.saturating_sub(1);
    let scale = Scale::new(
        axes,
        (as_f64(plot.first_step), as_f64(last_step)),
        (low, high),
    );

    for (value, label) in value_ticks.iter().zip(&labels) {
        let y = scale.y(*value);
        canvas.fill(axes.left, y, axes.right - axes.left, 1.0, RULE);
        canvas.text_right(label, axes.left - 10.0, y - 7.0, label_style);
    }
    canvas.fill(axes.left, axes.bottom, axes.right - axes.left, 1.0, GREY);
    for value in ticks(as_f64(plot.first_step), as_f64(last_step), 6) {
        if value.fract() == 0.0 {
            let x = scale.x(value);
            canvas.fill(x, axes.bottom, 1.0, 5.0, GREY);
            canvas.text_centred(&format!("{value:.0}"), x, axes.bottom + 8.0, label_style);
        }
    }
    canvas.text_right("step", axes.right, axes.bottom + 24.0, label_style);

    if let Some(chosen) = plot.chosen_step.filter(|step| *step <= last_step) {
        draw_choice(canvas, axes, scale.x(as_f64(chosen)));
    }
    for (curve, colour) in panel.curves.iter().zip(COLOURS) {
        let line = |values: &[f64]| -> Vec<(f32, f32)> {
            let points = values
                .iter()
                .enumerate()
                .filter(|(_, value)| value.is_finite());
            points
                .map(|(index, value)| (scale.x(as_f64(plot.first_step + index)), scale.y(*value)))
                .collect()
        };
        canvas.polyline(&line(&curve.values), 1.2, colour, 0.28);
        canvas.polyline(&line(&smooth(&curve.values)), 2.8, colour, 1.0);
    }
}

/// Draws the names of the curves to the right of the panel's title; a single curve needs none.
fn draw_legend(canvas: &mut Canvas, panel: &Panel, frame: Frame) {
    if panel.curves.len() < 2 {
        return;
    }
    let style = regular(13.5, GREY);
    let mut right = frame.right;
    for (curve, colour) in panel.curves.iter().zip(COLOURS).rev() {
        let width = canvas.text_width(&curve.name, style);
        canvas.text(&curve.name, right - width, frame.top + 1.0, style);
        right -= width + 28.0;
        let y = frame.top + 9.0;
        canvas.polyline(&[(right, y), (right + 20.0, y)], 2.8, colour, 1.0);
        right -= 18.0;
    }
}

/// Draws a dashed line at the step whose tokens were kept.
fn draw_choice(canvas: &mut Canvas, axes: Frame, x: f32) {
    let mut y = axes.top;
    while y < axes.bottom {
        canvas.fill(x, y, 1.0, 4.0_f32.min(axes.bottom - y), GREY);
        y += 8.0;
    }
    let style = regular(12.5, GREY);
    let room_at_right = x + canvas.text_width("kept", style) + 6.0 < axes.right;
    if room_at_right {
        canvas.text("kept", x + 6.0, axes.top - 2.0, style);
    } else {
        canvas.text_right("kept", x - 6.0, axes.top - 2.0, style);
    }
}

/// Maps steps and values to the canvas.
struct Scale {
    axes: Frame,
    steps: (f64, f64),
    values: (f64, f64),
}

impl Scale {
    fn new(axes: Frame, steps: (f64, f64), values: (f64, f64)) -> Self {
        Self {
            axes,
            steps,
            values,
        }
    }

    fn x(&self, step: f64) -> f32 {
        self.axes.left + share(step, self.steps) * (self.axes.right - self.axes.left)
    }

    fn y(&self, value: f64) -> f32 {
        self.axes.bottom - share(value, self.values) * (self.axes.bottom - self.axes.top)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "positions on a picture need no more digits"
)]
fn share(value: f64, (low, high): (f64, f64)) -> f32 {
    let share = if high > low {
        (value - low) / (high - low)
    } else {
        0.5
    };
    share.clamp(0.0, 1.0) as f32
}

/// Lowest and highest value to show: all but the most extreme hundredth at the top, so that an outlier
/// does not flatten the rest, with a small margin.
fn value_range(panel: &Panel) -> (f64, f64) {
    let mut values: Vec<f64> = panel
        .curves
        .iter()
        .flat_map(|curve| &curve.values)
        .copied()
        .collect();
    values.retain(|value| value.is_finite());
    values.sort_by(f64::total_cmp);
    let Some((lowest, highest)) = values.first().copied().zip(values.last().copied()) else {
        return (0.0, 1.0);
    };
    let kept = values.len() - values.len().div_ceil(100).min(values.len() - 1);
    let high = if values.len() >= 100 {
        values[kept - 1] * 1.1
    } else {
        highest
    };
    let air = ((high - lowest) * 0.06).max(high.abs() * 1e-3).max(1e-9);
    let low = if lowest >= 0.0 {
        (lowest - air).max(0.0)
    } else {
        lowest - air
    };
    (low, high.min(highest) + air)
}

/// The running mean of each value's neighbourhood.
fn smooth(values: &[f64]) -> Vec<f64> {
    let reach = rounded(as_f64(values.len()) * SMOOTHING);
    (0..values.len())
        .map(|index| {
            let near = &values[index.saturating_sub(reach)..(index + reach + 1).min(values.len())];
            let finite = near.iter().filter(|value| value.is_finite());
            let (sum, count) = finite.fold((0.0, 0.0), |(sum, n), value| (sum + value, n + 1.0));
            sum / count
        })
        .collect()
}

/// Distance between round numbers such that about `count` of them lie in the range.
fn tick_step(low: f64, high: f64, count: u32) -> f64 {
    let rough = (high - low).max(1e-12) / f64::from(count);
    let power = 10_f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 2.5, 5.0, 10.0].map(|factor| factor * power);
    steps
        .into_iter()
        .find(|step| *step >= rough * 0.999)
        .unwrap_or(10.0 * power)
}

fn ticks(low: f64, high: f64, count: u32) -> Vec<f64> {
    let step = tick_step(low, high, count);
    let first = (low / step).ceil();
    std::iter::successors(Some(first), |tick| Some(tick + 1.0))
        .map(|tick| tick * step)
        .take_while(|value| *value <= high + step * 1e-6)
        .collect()
}

/// A number with as many digits as the distance between ticks requires.
fn tick_label(value: f64, step: f64) -> String {
    let digits = (0..9).find(|digits| {
        let scaled = step * 10_f64.powi(*digits);
        (scaled - scaled.round()).abs() < scaled * 1e-6
    });
    let digits = digits
        .and_then(|digits| usize::try_from(digits).ok())
        .unwrap_or(9);
    format!("{:.digits$}", if value == 0.0 { 0.0 } else { value })
}

#[expect(clippy::cast_precision_loss, reason = "counts of steps are small")]
fn as_f64(count: usize) -> f64 {
    count as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a small non-negative number"
)]
fn rounded(value: f64) -> usize {
    value.round() as usize
}

#[expect(clippy::cast_precision_loss, reason = "counts of panels are small")]
fn count(panels: usize) -> f32 {
    panels as f32
}

#[cfg(test)]
mod tests {
    use super::super::canvas::PAPER;
    use super::*;

    fn curve(name: &str, steps: usize, value: impl Fn(f64) -> f64) -> Curve {
        Curve {
            name: name.into(),
            values: (0..steps).map(|step| value(as_f64(step))).collect(),
        }
    }

    fn plot(steps: usize) -> Plot {
        let noisy = |x: f64| (x * 12.9898).sin() * 0.2;
        Plot {
            title: "Learning the difference".into(),
            subtitle: "300 steps".into(),
            first_step: 1,
            chosen_step: Some(steps),
            panels: vec![
                Panel {
                    title: "total".into(),
                    curves: vec![curve("total", steps, |x| 1.0 / (x + 9.0) + noisy(x) * 0.1)],
                },
                Panel {
                    title: "token consistency".into(),
                    curves: vec![
                        curve("after", steps, |x| 0.3 + noisy(x)),
                        curve("before", steps, |x| 0.5 + noisy(x + 7.0)),
                    ],
                },
                Panel {
                    title: "CLIP".into(),
                    curves: vec![curve("clip", steps, |x| (-x / 99.0).exp())],
                },
            ],
        }
    }

    #[test]
    fn terms_that_are_not_computed_have_no_panel() {
        let titles = |terms: LossTerms| -> Vec<String> {
            let plot = of_learning(&[terms; 3], 3);
            let explains = plot.subtitle.starts_with("after:");
            assert_eq!(explains, plot.panels.len() == 3);
            plot.panels.into_iter().map(|panel| panel.title).collect()
        };
        let clip_alone = LossTerms {
            total: 2.0,
            clip: 1.0,
            ..LossTerms::default()
        };
        assert_eq!(titles(clip_alone), ["Total loss", "CLIP loss"]);
        let all = LossTerms {
            after: 0.5,
            ..clip_alone
        };
        assert_eq!(
            titles(all),
            ["Total loss", "Token consistency loss", "CLIP loss"]
        );
    }

    #[test]
    fn ticks_are_round_numbers_within_the_range() {
        assert_eq!(
            ticks(0.0, 1.0, 5),
            [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
        );
        assert_eq!(
            ticks(1.0, 300.0, 6),
            [50.0, 100.0, 150.0, 200.0, 250.0, 300.0]
        );
        assert_eq!(tick_label(0.6000000000000001, 0.2), "0.6");
        assert_eq!(tick_label(0.025, 0.0125), "0.0250");
        assert_eq!(tick_label(150.0, 50.0), "150");
    }

    #[test]
    fn smoothing_keeps_a_constant_and_skips_what_is_not_a_number() {
        let values = vec![2.0; 50];
        assert_eq!(smooth(&values), values);
        let mut holed = values.clone();
        holed[10] = f64::NAN;
        assert_eq!(smooth(&holed), values);
    }

    #[test]
    fn one_outlier_does_not_flatten_the_curve() {
        let mut values = vec![1.0; 300];
        values[7] = 1000.0;
        let panel = Panel {
            title: String::new(),
            curves: vec![Curve {
                name: "x".into(),
                values,
            }],
        };
        assert!(value_range(&panel).1 < 2.0);
    }

    #[test]
    fn any_number_of_steps_is_drawn() {
        for steps in [0, 1, 2, 300] {
            let image = draw(&plot(steps)).unwrap();
            assert_eq!(image.dimensions(), (WIDTH, HEIGHT));
            let count = |colour| image.pixels().filter(|pixel| **pixel == colour).count();
            assert!(count(PAPER) > 0 && count(INK) > 0, "{steps}");
            // The legend's mark has fewer pixels than a line has; a single step draws no line.
            assert_eq!(count(ACCENT) > 1000, steps > 1, "{steps}");
        }
    }
}
