//! The contact sheet: A → A′ on the left, B → B′ on the right, a caption under each picture.

use image::{Rgb, RgbImage, imageops};

use super::canvas::{ACCENT, Canvas, GREY, INK, RULE, TextStyle, bold, length, pixel, regular};

/// A picture with its name and caption.
pub(crate) struct Tile<'a> {
    pub(crate) picture: &'a RgbImage,
    pub(crate) name: &'a str,
    pub(crate) caption: &'a str,
}

/// Everything on one sheet: the examples on the left, the result on the right.
pub(crate) struct Sheet<'a> {
    pub(crate) examples: Vec<[Tile<'a>; 2]>,
    pub(crate) results: Vec<[Tile<'a>; 2]>,
    /// One line at the foot of the sheet.
    pub(crate) footer: &'a str,
}

const MARGIN: f32 = 36.0;
/// Between the two pictures of a pair, where the arrow is.
const PAIR_GAP: f32 = 56.0;
/// Between the examples and the results, where the `::` is.
const COLUMN_GAP: f32 = 92.0;
const ROW_GAP: f32 = 36.0;
const NAME_GAP: f32 = 14.0;
const FOOTER_GAP: f32 = 27.0;
const CAPTION_LINES: usize = 4;

fn name_style() -> TextStyle {
    bold(20.0, INK)
}

fn caption_style() -> TextStyle {
    regular(14.5, GREY)
}

fn footer_style() -> TextStyle {
    regular(13.0, GREY)
}

/// Draws the sheet.
pub(crate) fn draw(sheet: &Sheet<'_>) -> anyhow::Result<RgbImage> {
    let ruler = Canvas::new(1, 1)?;
    let tiles = TileBox::of(sheet);
    let row_heights: Vec<f32> = (0..sheet.examples.len().max(sheet.results.len()))
        .map(|row| {
            let pairs = [sheet.examples.get(row), sheet.results.get(row)];
            let heights = pairs.into_iter().flatten().flatten();
            heights
                .map(|tile| tiles.height_with_text(&ruler, tile))
                .fold(0.0, f32::max)
        })
        .collect();
    let columns = if sheet.examples.is_empty() { 1.0 } else { 2.0 };
    let width = 2.0 * MARGIN + tiles.pair_width() * columns + COLUMN_GAP * (columns - 1.0);
    let footer = ruler.wrap(sheet.footer, width - 2.0 * MARGIN, 2, footer_style());
    let rows_height = row_heights
        .iter()
        .map(|height| height + ROW_GAP)
        .sum::<f32>()
        - ROW_GAP;
    let footer_height = FOOTER_GAP + count(footer.len()) * footer_style().line_height();
    let height = 2.0 * MARGIN + rows_height + footer_height;

    let mut canvas = Canvas::new(pixel(width.ceil()), pixel(height.ceil()))?;
    let mut y = MARGIN;
    for (row, row_height) in row_heights.iter().enumerate() {
        let mut x = MARGIN;
        if let Some(pair) = sheet.examples.get(row) {
            tiles.draw_pair(&mut canvas, pair, (x, y), RULE);
        }
        if !sheet.examples.is_empty() {
            x += tiles.pair_width();
            if row == 0 && !sheet.results.is_empty() {
                draw_proportion(&mut canvas, x + COLUMN_GAP / 2.0, y + tiles.height / 2.0);
            }
            x += COLUMN_GAP;
        }
        if let Some(pair) = sheet.results.get(row) {
            tiles.draw_pair(&mut canvas, pair, (x, y), ACCENT);
        }
        y += row_height + ROW_GAP;
    }
    y += FOOTER_GAP - ROW_GAP;
    for line in footer {
        canvas.text(&line, MARGIN, y, footer_style());
        y += footer_style().line_height();
    }
    Ok(canvas.into_image())
}

/// The box into which every picture is fitted.
struct TileBox {
    width: f32,
    height: f32,
}

impl TileBox {
    /// As large as the largest picture, with a longer side between 256 and 512 pixels: smaller
    /// pictures are enlarged by a whole factor.
    fn of(sheet: &Sheet<'_>) -> Self {
        let tiles = || sheet.examples.iter().chain(&sheet.results).flatten();
        let width = tiles().map(|tile| tile.picture.width()).max().unwrap_or(1);
        let height = tiles().map(|tile| tile.picture.height()).max().unwrap_or(1);
        let side = width.max(height);
        let scale = length((side * 256_u32.div_ceil(side)).min(512)) / length(side);
        Self {
            width: (length(width) * scale).round(),
            height: (length(height) * scale).round(),
        }
    }

    fn pair_width(&self) -> f32 {
        2.0 * self.width + PAIR_GAP
    }

    fn height_with_text(&self, ruler: &Canvas, tile: &Tile<'_>) -> f32 {
        let lines = ruler
            .wrap(tile.caption, self.width, CAPTION_LINES, caption_style())
            .len();
        let text = name_style().line_height() + count(lines) * caption_style().line_height();
        self.height + NAME_GAP + text
    }

    /// Draws before → after with its upper left corner at (x, y); the frame is around after.
    fn draw_pair(
        &self,
        canvas: &mut Canvas,
        pair: &[Tile<'_>; 2],
        (x, y): (f32, f32),
        frame: Rgb<u8>,
    ) {
        let [before, after] = pair;
        self.draw(canvas, before, (x, y), RULE);
        draw_arrow(
            canvas,
            x + self.width + PAIR_GAP / 2.0,
            y + self.height / 2.0,
        );
        self.draw(canvas, after, (x + self.width + PAIR_GAP, y), frame);
    }

    fn draw(&self, canvas: &mut Canvas, tile: &Tile<'_>, (x, y): (f32, f32), frame: Rgb<u8>) {
        let picture = self.fit(tile.picture);
        let left = x + ((self.width - length(picture.width())) / 2.0).floor();
        let top = y + ((self.height - length(picture.height())) / 2.0).floor();
        let border = if frame == ACCENT { 3.0 } else { 1.0 };
        canvas.picture(&picture, left, top, border, frame);

        let mut y = y + self.height + NAME_GAP;
        canvas.text(tile.name, x, y, name_style());
        y += name_style().line_height();
        for line in canvas.wrap(tile.caption, self.width, CAPTION_LINES, caption_style()) {
            canvas.text(&line, x, y, caption_style());
            y += caption_style().line_height();
        }
    }

    /// The picture at the largest size that fits.
    fn fit(&self, picture: &RgbImage) -> RgbImage {
        let (width, height) = picture.dimensions();
        let scale = (self.width / length(width)).min(self.height / length(height));
        let to = |pixels: u32| pixel((length(pixels) * scale).round()).max(1);
        if (to(width), to(height)) == (width, height) {
            return picture.clone();
        }
        imageops::resize(
            picture,
            to(width),
            to(height),
            imageops::FilterType::CatmullRom,
        )
    }
}

fn draw_arrow(canvas: &mut Canvas, x: f32, y: f32) {
    let (half, head) = (13.0, 7.0);
    let tip = (x + half, y);
    canvas.polyline(&[(x - half, y), tip], 2.4, GREY, 1.0);
    canvas.polyline(
        &[(tip.0 - head, y - head), tip, (tip.0 - head, y + head)],
        2.4,
        GREY,
        1.0,
    );
}

/// The `::` of "A is to A′ as B is to B′".
fn draw_proportion(canvas: &mut Canvas, x: f32, y: f32) {
    for (dx, dy) in [(-7.0, -7.0), (7.0, -7.0), (-7.0, 7.0), (7.0, 7.0)] {
        canvas.disc(x + dx, y + dy, 3.4, GREY);
    }
}

fn count(lines: usize) -> f32 {
    length(u32::try_from(lines).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradient(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            let byte = |v: u32, n: u32| u8::try_from(v * 255 / n.max(1)).unwrap_or(255);
            Rgb([byte(x, width), byte(y, height), 160])
        })
    }

    fn sheet<'a>(picture: &'a RgbImage, rows: usize, caption: &'a str) -> Sheet<'a> {
        let pair = |names: [&'static str; 2]| {
            names.map(|name| Tile {
                picture,
                name,
                caption,
            })
        };
        Sheet {
            examples: (0..rows).map(|_| pair(["A", "A′"])).collect(),
            results: vec![pair(["B", "B′"])],
            footer: "Difference Inversion · 300 steps · seed 0",
        }
    }

    fn tile_box(picture: &RgbImage) -> (u32, u32) {
        let tiles = TileBox::of(&sheet(picture, 1, ""));
        (pixel(tiles.width), pixel(tiles.height))
    }

    #[test]
    fn small_pictures_are_enlarged_by_a_whole_factor() {
        assert_eq!(tile_box(&gradient(96, 96)), (288, 288));
        assert_eq!(tile_box(&gradient(300, 180)), (300, 180));
        assert_eq!(tile_box(&gradient(2000, 1000)), (512, 256));
    }

    #[test]
    fn a_sheet_has_four_tiles_side_by_side_and_one_row_per_example() {
        let picture = gradient(128, 128);
        let one = draw(&sheet(&picture, 1, "a red house on grass")).unwrap();
        assert!(one.width() > 4 * 256);
        let three = draw(&sheet(&picture, 3, "a red house on grass")).unwrap();
        assert_eq!(three.width(), one.width());
        assert!(three.height() > one.height() + 2 * 256);
    }

    #[test]
    fn odd_pictures_and_missing_captions_are_drawn_too() {
        let picture = gradient(1, 7);
        assert!(draw(&sheet(&picture, 1, "")).is_ok());
    }
}
