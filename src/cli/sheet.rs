//! The contact sheet: A → A′ on the left, B → B′ on the right, a caption under each picture.

use image::{RgbImage, imageops};

use super::canvas::{ACCENT, Canvas, GREY, INK, RULE, TextStyle, bold, length, pixel, regular};

/// A picture with its name and what it shows.
pub(crate) struct Tile<'a> {
    pub(crate) picture: &'a RgbImage,
    pub(crate) name: &'a str,
    pub(crate) caption: &'a str,
}

/// Everything on one sheet: the examples on the left, what was made of them on the right.
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
    let side = tile_side(sheet);
    let columns = if sheet.examples.is_empty() { 1 } else { 2 };
    let pair_width = 2.0 * side + PAIR_GAP;
    let width = 2.0 * MARGIN + pair_width * length(columns) + COLUMN_GAP * length(columns - 1);

    let ruler = Canvas::new(1, 1)?;
    let rows = sheet.examples.len().max(sheet.results.len());
    let row_heights: Vec<f32> = (0..rows)
        .map(|row| {
            let pairs = [sheet.examples.get(row), sheet.results.get(row)];
            let tiles = pairs.into_iter().flatten().flatten();
            tiles
                .map(|tile| tile_height(&ruler, tile, side))
                .fold(0.0, f32::max)
        })
        .collect();
    let footer = ruler.wrap(sheet.footer, width - 2.0 * MARGIN, 2, footer_style());
    let footer_height = length_of(footer.len()) * footer_style().line_height();
    let height = 2.0 * MARGIN
        + row_heights.iter().sum::<f32>()
        + ROW_GAP * length_of(rows.saturating_sub(1))
        + ROW_GAP * 0.75
        + footer_height;

    let mut canvas = Canvas::new(pixel(width.ceil()), pixel(height.ceil()))?;
    let mut y = MARGIN;
    for (row, row_height) in row_heights.iter().enumerate() {
        let mut x = MARGIN;
        if let Some(pair) = sheet.examples.get(row) {
            draw_pair(&mut canvas, pair, x, y, side, RULE);
        }
        if !sheet.examples.is_empty() {
            x += pair_width;
            if row == 0 && !sheet.results.is_empty() {
                draw_proportion(&mut canvas, x + COLUMN_GAP / 2.0, y + side / 2.0);
            }
            x += COLUMN_GAP;
        }
        if let Some(pair) = sheet.results.get(row) {
            draw_pair(&mut canvas, pair, x, y, side, ACCENT);
        }
        y += row_height + ROW_GAP;
    }
    y += ROW_GAP * -0.25;
    for line in footer {
        canvas.text(&line, MARGIN, y, footer_style());
        y += footer_style().line_height();
    }
    Ok(canvas.into_image())
}

/// Side of the square that every picture is fitted into: its own size between 256 and 512 pixels,
/// a whole multiple of it when it is smaller.
fn tile_side(sheet: &Sheet<'_>) -> f32 {
    let tiles = sheet.examples.iter().chain(&sheet.results).flatten();
    let largest = tiles
        .map(|tile| tile.picture.width().max(tile.picture.height()))
        .max()
        .unwrap_or(256);
    let multiple = 256_u32.div_ceil(largest.max(1));
    length((largest * multiple).min(512))
}

fn tile_height(ruler: &Canvas, tile: &Tile<'_>, side: f32) -> f32 {
    let lines = ruler
        .wrap(tile.caption, side, CAPTION_LINES, caption_style())
        .len();
    side + NAME_GAP + name_style().line_height() + length_of(lines) * caption_style().line_height()
}

fn draw_pair(
    canvas: &mut Canvas,
    pair: &[Tile<'_>; 2],
    x: f32,
    y: f32,
    side: f32,
    result_frame: image::Rgb<u8>,
) {
    let [before, after] = pair;
    draw_tile(canvas, before, x, y, side, RULE);
    draw_arrow(canvas, x + side + PAIR_GAP / 2.0, y + side / 2.0);
    draw_tile(canvas, after, x + side + PAIR_GAP, y, side, result_frame);
}

fn draw_tile(
    canvas: &mut Canvas,
    tile: &Tile<'_>,
    x: f32,
    y: f32,
    side: f32,
    frame: image::Rgb<u8>,
) {
    let picture = fit(tile.picture, side);
    let left = x + ((side - length(picture.width())) / 2.0).floor();
    let top = y + ((side - length(picture.height())) / 2.0).floor();
    let border = if frame == ACCENT { 3.0 } else { 1.0 };
    canvas.picture(&picture, left, top, border, frame);

    let mut y = y + side + NAME_GAP;
    canvas.text(tile.name, x, y, name_style());
    y += name_style().line_height();
    for line in canvas.wrap(tile.caption, side, CAPTION_LINES, caption_style()) {
        canvas.text(&line, x, y, caption_style());
        y += caption_style().line_height();
    }
}

/// The picture at the largest size that fits a square.
fn fit(picture: &RgbImage, side: f32) -> RgbImage {
    let (width, height) = picture.dimensions();
    let scale = side / length(width.max(height).max(1));
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

fn draw_arrow(canvas: &mut Canvas, x: f32, y: f32) {
    let (half, head) = (13.0, 7.0);
    canvas.polyline(&[(x - half, y), (x + half, y)], 2.4, GREY, 1.0);
    canvas.polyline(
        &[
            (x + half - head, y - head),
            (x + half, y),
            (x + half - head, y + head),
        ],
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

fn length_of(count: usize) -> f32 {
    length(u32::try_from(count).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use image::Rgb;

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

    #[test]
    fn small_pictures_are_enlarged_by_a_whole_factor() {
        let picture = gradient(96, 96);
        assert!((tile_side(&sheet(&picture, 1, "")) - 288.0).abs() < f32::EPSILON);
        let picture = gradient(2000, 900);
        assert!((tile_side(&sheet(&picture, 1, "")) - 512.0).abs() < f32::EPSILON);
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
