//! A small drawing surface: filled rectangles, pictures, smooth lines and text in a real font.
//!
//! Positions and lengths are in pixels from the upper left corner.

use ab_glyph::{Font, FontRef, Glyph, PxScale, ScaleFont, point};
use image::{Rgb, RgbImage, imageops};

/// The background of every picture the program draws.
pub(crate) const PAPER: Rgb<u8> = Rgb([255, 255, 255]);
/// Headings.
pub(crate) const INK: Rgb<u8> = Rgb([31, 35, 40]);
/// Captions and numbers.
pub(crate) const GREY: Rgb<u8> = Rgb([101, 109, 118]);
/// Frames and grid lines.
pub(crate) const RULE: Rgb<u8> = Rgb([222, 226, 230]);
/// The most prominent element.
pub(crate) const ACCENT: Rgb<u8> = Rgb([9, 105, 218]);

/// One weight of the built-in font at one size.
#[derive(Clone, Copy)]
pub(crate) struct TextStyle {
    /// Height of the letters in pixels.
    pub(crate) size: f32,
    pub(crate) bold: bool,
    pub(crate) colour: Rgb<u8>,
}

/// A style in the regular weight.
pub(crate) fn regular(size: f32, colour: Rgb<u8>) -> TextStyle {
    TextStyle {
        size,
        bold: false,
        colour,
    }
}

/// A style in the bold weight.
pub(crate) fn bold(size: f32, colour: Rgb<u8>) -> TextStyle {
    TextStyle {
        size,
        bold: true,
        colour,
    }
}

impl TextStyle {
    /// Distance from one base line to the next.
    pub(crate) fn line_height(self) -> f32 {
        self.size * 1.3
    }
}

/// The picture being drawn, with its fonts.
pub(crate) struct Canvas {
    image: RgbImage,
    regular: FontRef<'static>,
    bold: FontRef<'static>,
}

impl Canvas {
    /// A white canvas.
    pub(crate) fn new(width: u32, height: u32) -> anyhow::Result<Self> {
        Ok(Self {
            image: RgbImage::from_pixel(width, height, PAPER),
            regular: FontRef::try_from_slice(dejavu::sans::regular())?,
            bold: FontRef::try_from_slice(dejavu::sans::bold())?,
        })
    }

    /// The finished picture.
    pub(crate) fn into_image(self) -> RgbImage {
        self.image
    }

    /// Fills a rectangle.
    pub(crate) fn fill(&mut self, x: f32, y: f32, width: f32, height: f32, colour: Rgb<u8>) {
        for row in pixel(y)..pixel(y + height).min(self.image.height()) {
            for column in pixel(x)..pixel(x + width).min(self.image.width()) {
                self.image.put_pixel(column, row, colour);
            }
        }
    }

    /// Draws a picture with a frame of `border` pixels around it.
    pub(crate) fn picture(
        &mut self,
        picture: &RgbImage,
        x: f32,
        y: f32,
        border: f32,
        frame: Rgb<u8>,
    ) {
        let (width, height) = (length(picture.width()), length(picture.height()));
        self.fill(
            x - border,
            y - border,
            width + 2.0 * border,
            height + 2.0 * border,
            frame,
        );
        imageops::replace(&mut self.image, picture, pixel(x).into(), pixel(y).into());
    }

    /// Draws one line of text, the top of its letters at `y`; returns its width.
    pub(crate) fn text(&mut self, text: &str, x: f32, y: f32, style: TextStyle) -> f32 {
        let baseline = y + style.size * 0.93;
        let (glyphs, width) = self.lay_out(text, style);
        let font = if style.bold {
            self.bold.clone()
        } else {
            self.regular.clone()
        };
        for mut glyph in glyphs {
            glyph.position = point(glyph.position.x + x, baseline);
            let Some(outline) = font.outline_glyph(glyph) else {
                continue;
            };
            let bounds = outline.px_bounds();
            outline.draw(|column, row, coverage| {
                self.blend(
                    bounds.min.x + length(column),
                    bounds.min.y + length(row),
                    style.colour,
                    coverage,
                );
            });
        }
        width
    }

    /// Draws one line of text centred at `x`.
    pub(crate) fn text_centred(&mut self, text: &str, x: f32, y: f32, style: TextStyle) {
        let width = self.text_width(text, style);
        self.text(text, x - width / 2.0, y, style);
    }

    /// Draws one line of text that ends at `x`.
    pub(crate) fn text_right(&mut self, text: &str, x: f32, y: f32, style: TextStyle) {
        let width = self.text_width(text, style);
        self.text(text, x - width, y, style);
    }

    /// The width of a line of text.
    pub(crate) fn text_width(&self, text: &str, style: TextStyle) -> f32 {
        self.lay_out(text, style).1
    }

    /// Breaks text into at most `lines` lines of at most `width` pixels. A longer text ends in an ellipsis;
    /// a word longer than a line is cut.
    pub(crate) fn wrap(
        &self,
        text: &str,
        width: f32,
        lines: usize,
        style: TextStyle,
    ) -> Vec<String> {
        let fits = |line: &str| self.text_width(line, style) <= width;
        let mut wrapped: Vec<String> = Vec::new();
        let mut line = String::new();
        for word in text.split_whitespace() {
            let longer = if line.is_empty() {
                word.to_owned()
            } else {
                format!("{line} {word}")
            };
            if fits(&longer) {
                line = longer;
                continue;
            }
            if !line.is_empty() {
                wrapped.push(std::mem::take(&mut line));
            }
            for letter in word.chars() {
                line.push(letter);
                if !fits(&line) {
                    line.pop();
                    wrapped.push(std::mem::replace(&mut line, letter.to_string()));
                }
            }
        }
        if !line.is_empty() {
            wrapped.push(line);
        }
        if wrapped.len() > lines {
            wrapped.truncate(lines);
            if let Some(last) = wrapped.last_mut() {
                while !last.is_empty() && !fits(&format!("{last}…")) {
                    last.pop();
                }
                *last = format!("{}…", last.trim_end());
            }
        }
        wrapped
    }

    /// Draws a smooth line through the points; `opacity` is in [0, 1].
    pub(crate) fn polyline(
        &mut self,
        points: &[(f32, f32)],
        width: f32,
        colour: Rgb<u8>,
        opacity: f32,
    ) {
        let columns = self.image.width() as usize;
        let mut coverage = vec![0.0_f32; columns * self.image.height() as usize];
        let reach = width / 2.0 + 1.0;
        for segment in points.windows(2) {
            let ((x0, y0), (x1, y1)) = (segment[0], segment[1]);
            let rows =
                pixel(y0.min(y1) - reach)..(pixel(y0.max(y1) + reach) + 1).min(self.image.height());
            for row in rows {
                let columns_near = pixel(x0.min(x1) - reach)
                    ..(pixel(x0.max(x1) + reach) + 1).min(self.image.width());
                for column in columns_near {
                    let centre = (length(column) + 0.5, length(row) + 0.5);
                    let distance = distance_to_segment(centre, (x0, y0), (x1, y1));
                    let covered = (width / 2.0 + 0.5 - distance).clamp(0.0, 1.0);
                    let cell = &mut coverage[row as usize * columns + column as usize];
                    *cell = cell.max(covered);
                }
            }
        }
        for (index, covered) in coverage.into_iter().enumerate().filter(|(_, c)| *c > 0.0) {
            let (x, y) = (index % columns, index.checked_div(columns).unwrap_or(0));
            self.blend_at(x, y, colour, covered * opacity);
        }
    }

    /// Draws a filled disc.
    pub(crate) fn disc(&mut self, x: f32, y: f32, radius: f32, colour: Rgb<u8>) {
        self.polyline(&[(x, y), (x, y)], 2.0 * radius, colour, 1.0);
    }

    /// Glyphs of one line from x = 0 on, and the line's width.
    fn lay_out(&self, text: &str, style: TextStyle) -> (Vec<Glyph>, f32) {
        let font = if style.bold {
            &self.bold
        } else {
            &self.regular
        };
        let scale = PxScale::from(style.size * 1.16);
        let scaled = font.as_scaled(scale);
        let mut x = 0.0;
        let mut previous = None;
        let mut glyphs = Vec::new();
        for letter in text.chars() {
            let id = scaled.glyph_id(letter);
            if let Some(previous) = previous {
                x += scaled.kern(previous, id);
            }
            glyphs.push(id.with_scale_and_position(scale, point(x, 0.0)));
            x += scaled.h_advance(id);
            previous = Some(id);
        }
        (glyphs, x)
    }

    fn blend(&mut self, x: f32, y: f32, colour: Rgb<u8>, opacity: f32) {
        if x >= 0.0 && y >= 0.0 {
            self.blend_at(pixel(x) as usize, pixel(y) as usize, colour, opacity);
        }
    }

    fn blend_at(&mut self, x: usize, y: usize, colour: Rgb<u8>, opacity: f32) {
        let position = u32::try_from(x).ok().zip(u32::try_from(y).ok());
        let Some(old) = position.and_then(|(x, y)| self.image.get_pixel_mut_checked(x, y)) else {
            return;
        };
        for (old, new) in old.0.iter_mut().zip(colour.0) {
            *old = channel(f32::from(*old) + (f32::from(new) - f32::from(*old)) * opacity);
        }
    }
}

/// Converts a number of pixels to a length.
#[expect(
    clippy::cast_precision_loss,
    reason = "no picture has 2^24 pixels on a side"
)]
pub(crate) fn length(pixels: u32) -> f32 {
    pixels as f32
}

/// The pixel of a position; positions left of or above the canvas are clamped to its edge.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rounding to whole pixels is the purpose; the cast saturates"
)]
pub(crate) fn pixel(position: f32) -> u32 {
    (position + 1e-3).floor().max(0.0) as u32
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the value is clamped to a byte's range"
)]
fn channel(value: f32) -> u8 {
    value.round().clamp(0.0, 255.0) as u8
}

fn distance_to_segment(p: (f32, f32), a: (f32, f32), b: (f32, f32)) -> f32 {
    let (dx, dy) = (b.0 - a.0, b.1 - a.1);
    let squared_length = dx * dx + dy * dy;
    let along = if squared_length > 0.0 {
        (((p.0 - a.0) * dx + (p.1 - a.1) * dy) / squared_length).clamp(0.0, 1.0)
    } else {
        0.0
    };
    (p.0 - a.0 - along * dx).hypot(p.1 - a.1 - along * dy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapped_lines_fit_and_keep_every_word() {
        let canvas = Canvas::new(8, 8).unwrap();
        let style = regular(14.0, INK);
        let text = "a small red house on a snowy hill at night, with a moon and birds";
        let lines = canvas.wrap(text, 120.0, 20, style);
        assert!(lines.len() > 2);
        assert!(
            lines
                .iter()
                .all(|line| canvas.text_width(line, style) <= 120.0)
        );
        assert_eq!(lines.join(" "), text);
    }

    #[test]
    fn a_long_text_ends_in_an_ellipsis_and_a_long_word_is_cut() {
        let canvas = Canvas::new(8, 8).unwrap();
        let style = bold(14.0, INK);
        let lines = canvas.wrap(&"x".repeat(200), 100.0, 3, style);
        assert_eq!(lines.len(), 3);
        assert!(lines[2].ends_with('…'));
        assert!(
            lines
                .iter()
                .all(|line| canvas.text_width(line, style) <= 100.0)
        );
    }

    #[test]
    fn drawing_outside_the_canvas_is_cut_off() {
        let mut canvas = Canvas::new(16, 16).unwrap();
        canvas.fill(-5.0, -5.0, 100.0, 100.0, RULE);
        canvas.text("wide text", -20.0, -4.0, bold(30.0, INK));
        canvas.polyline(&[(-10.0, -10.0), (40.0, 40.0)], 3.0, ACCENT, 1.0);
        let image = canvas.into_image();
        assert_eq!(image.dimensions(), (16, 16));
        assert_eq!(*image.get_pixel(8, 8), ACCENT);
        assert_eq!(*image.get_pixel(15, 0), RULE);
    }

    #[test]
    fn a_line_covers_its_middle_fully_and_spares_the_rest() {
        let mut canvas = Canvas::new(20, 20).unwrap();
        canvas.polyline(&[(2.0, 10.0), (18.0, 10.0)], 4.0, INK, 1.0);
        let image = canvas.into_image();
        assert_eq!(*image.get_pixel(10, 10), INK);
        assert_eq!(*image.get_pixel(10, 2), PAPER);
    }
}
