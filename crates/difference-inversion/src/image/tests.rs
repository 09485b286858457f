use std::io::Cursor;
use std::path::PathBuf;

use ::image::{DynamicImage, ImageBuffer, ImageEncoder, ImageFormat, Luma, LumaA, Rgb, Rgba};
use burn::tensor::FloatDType;

use crate::image::*;
use crate::weights::Weights;

fn golden(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .join("tests/golden/images")
        .join(name)
}

/// Writes `bytes` to a file and loads it as a picture.
fn load(bytes: &[u8]) -> Result<RgbImage> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.dat");
    std::fs::write(&path, bytes).unwrap();
    load_image(&path)
}

fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn gradient(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        Rgb([x * 7 % 256, y * 11 % 256, (x + y) % 256].map(|v| v.to_le_bytes()[0]))
    })
}

/// The reason why the picture is refused.
fn refusal(bytes: &[u8]) -> String {
    let message = load(bytes).unwrap_err().to_string();
    let Some((_, reason)) = message.split_once("picture.dat: ") else {
        panic!("the file is not named: {message}");
    };
    reason.to_owned()
}

#[test]
fn colours_of_a_profile_become_srgb() {
    let picture = RgbImage::from_fn(9, 8, |x, _| match x % 3 {
        0 => Rgb([200, 100, 50]),
        1 => Rgb([60, 160, 90]),
        _ => Rgb([128, 128, 128]),
    });
    let with_profile = |profile: Vec<u8>| {
        let mut bytes = Vec::new();
        let mut encoder = ::image::codecs::png::PngEncoder::new(&mut bytes);
        encoder.set_icc_profile(profile).unwrap();
        picture.write_with_encoder(encoder).unwrap();
        load(&bytes).unwrap()
    };
    // Display P3, by the matrix from its primaries to those of sRGB.
    let found = with_profile(moxcms::ColorProfile::new_display_p3().encode().unwrap());
    for (x, expected) in [(0, [215, 93, 31]), (1, [0, 163, 82]), (2, [128; 3])] {
        let pixel = found.get_pixel(x, 0).0;
        let near = pixel
            .iter()
            .zip(expected)
            .all(|(&found, expected)| found.abs_diff(expected) <= 1);
        assert!(near, "{pixel:?}, not {expected:?}");
    }
    let srgb = moxcms::ColorProfile::new_srgb().encode().unwrap();
    assert_eq!(with_profile(srgb), picture);
    assert_eq!(with_profile(b"no profile".to_vec()), picture);
}

#[test]
fn a_missing_file_is_named() {
    let message = load_image(Path::new("absent/cat.png"))
        .unwrap_err()
        .to_string();
    assert!(
        message.starts_with("absent/cat.png: No such file"),
        "{message}"
    );
}

#[test]
fn a_folder_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let message = load_image(folder.path()).unwrap_err().to_string();
    assert!(
        message.ends_with("a folder, expected a picture"),
        "{message}"
    );
}

/// Every common format: read as by Pillow, or refused with a reason.
#[test]
fn pictures_are_what_pillow_reads() {
    let folder = golden("../pictures");
    let read = |name: &str| load_image(&folder.join(name));
    let names = std::fs::read_dir(&folder).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let expected: Vec<String> = names
        .filter(|name| name.ends_with(".expected.png"))
        .collect();
    assert!(expected.len() > 70, "{}", expected.len());
    let mut wrong = Vec::new();
    for expected in expected {
        let name = expected.trim_end_matches(".expected.png");
        let expected = read(&expected).unwrap();
        match read(name) {
            Ok(found) if found.dimensions() == expected.dimensions() => {
                let pairs = found.iter().zip(expected.iter());
                let worst = pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap();
                if worst > 1 {
                    wrong.push(format!("{name}: {worst} off"));
                }
            }
            Ok(found) => wrong.push(format!(
                "{name}: {:?}, not {:?}",
                found.dimensions(),
                expected.dimensions()
            )),
            Err(error) => wrong.push(error.to_string()),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_not_read_is_called_by_its_name() {
    let folder = golden("../pictures");
    let names = std::fs::read_to_string(folder.join("refused.json")).unwrap();
    let names: Vec<String> = serde_json::from_str(&names).unwrap();
    for name in names {
        let message = load_image(&folder.join(&name)).unwrap_err().to_string();
        let told = ["which is not read", "expected PNG, JPEG"];
        assert!(told.iter().any(|told| message.contains(told)), "{message}");
    }
    for (bytes, expected) in [
        (
            &b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"[..],
            "the format HEIC",
        ),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "the format AVIF"),
        (b"\0\0\0\x14ftypisom\0\0\x02\0isom", "a video"),
        (
            b"\0\0\0\x18ftypcrx \0\0\0\x01crx isom",
            "a camera's raw photograph",
        ),
        (b"\xff\x0a and so on", "the format JPEG XL"),
        (b"8BPS\0\x01", "the format Photoshop"),
        (b"icns\0\0\x10\0", "the format icon (ICNS)"),
        (
            b"#define x_width 8\n#define x_height 8\n",
            "the format X bitmap",
        ),
        (
            b"\0\0\x02\0\0\0\0\0\0\0\0\0\x08\0\x08\0\x18\x20 and pixels",
            "the format Truevision TGA",
        ),
        (b"old, TRUEVISION-XFILE.\0", "the format Truevision TGA"),
        (
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            "the format SVG",
        ),
        (b"<!DOCTYPE html><title>404</title>", "a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "git lfs pull",
        ),
        (b"PK\x03\x04 and so on", "a ZIP archive"),
        (b"{\"a\": 1}", "JSON"),
    ] {
        let reason = refusal(bytes);
        assert!(reason.contains(expected), "{reason}");
    }
}

/// A TIFF without compression, whose pixels stand before its directory.
fn tiff_of(image: &RgbImage) -> Vec<u8> {
    let (width, height, pixels) = (image.width(), image.height(), image.as_raw());
    let bits = 8 + pixels.len().next_multiple_of(2);
    let mut tiff = b"II*\0".to_vec();
    let number = |value: usize| u32::try_from(value).unwrap();
    tiff.extend(number(bits + 6).to_le_bytes());
    tiff.extend(pixels);
    tiff.resize(bits, 0);
    tiff.extend([8_u16; 3].map(u16::to_le_bytes).concat());
    let entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 3, number(bits)),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 8),
        (277, 3, 1, 3),
        (278, 4, 1, height),
        (279, 4, 1, number(pixels.len())),
    ];
    tiff.extend(9_u16.to_le_bytes());
    for (tag, kind, count, value) in entries {
        tiff.extend([tag, kind].map(u16::to_le_bytes).concat());
        tiff.extend([count, value].map(u32::to_le_bytes).concat());
    }
    tiff.extend([0; 4]);
    tiff
}

#[test]
fn pictures_whose_bytes_resemble_other_files_are_read() {
    // The byte of a GIF's height is where a safetensors file has a brace.
    let image = gradient(9, 123);
    let gif = encoded(&DynamicImage::ImageRgb8(image.clone()), ImageFormat::Gif);
    assert_eq!(gif[8], b'{');
    assert_eq!(load(&gif).unwrap().dimensions(), (9, 123));
    // The pixels of a TIFF may stand where a camera's raw photograph has its mark.
    let mut image = image;
    image.put_pixel(0, 0, Rgb([b'C', b'R', 2]));
    let tiff = tiff_of(&image);
    assert_eq!(tiff[8..10], *b"CR");
    assert_eq!(load(&tiff).unwrap(), image);
}

#[test]
fn what_is_not_a_picture_is_refused() {
    assert!(refusal(b"").contains("empty"));
    assert!(refusal(b"# a text file\n").contains("not a picture"));
    assert!(refusal(b"\x89PNG\r\n\x1a\n and then nonsense").contains("cannot be decoded"));
}

#[test]
fn truncated_pictures_of_every_format_are_refused() {
    // Smooth, so that JPEG loses little, and of few colours, so that GIF loses none.
    let image = RgbImage::from_fn(40, 30, |x, y| {
        Rgb([x / 4 * 20, y / 3 * 20, 90].map(|v| v.to_le_bytes()[0]))
    });
    for (format, lost) in [
        (ImageFormat::Png, 0),
        (ImageFormat::Jpeg, 25),
        (ImageFormat::WebP, 0),
        (ImageFormat::Gif, 0),
        (ImageFormat::Bmp, 0),
        (ImageFormat::Tiff, 0),
    ] {
        let bytes = encoded(&image.clone().into(), format);
        let found = load(&bytes).unwrap();
        assert_eq!(found.dimensions(), (40, 30), "{format:?}");
        let pairs = found.iter().zip(image.iter());
        let worst = pairs.map(|(a, b)| a.abs_diff(*b)).max();
        assert!(worst <= Some(lost), "{format:?}: {worst:?}");
        for part in [2, 10].map(|part: usize| bytes.len().div_euclid(part)) {
            let reason = refusal(&bytes[..part]);
            assert!(
                ["truncated", "cannot be decoded"]
                    .iter()
                    .any(|text| reason.contains(text)),
                "{format:?}: {reason}"
            );
        }
    }
}

#[test]
fn a_jpeg_cut_after_its_thumbnail_is_truncated() {
    // A whole JPEG inside an APP1 segment has an end marker of its own.
    let thumbnail = encoded(&gradient(8, 8).into(), ImageFormat::Jpeg);
    let mut bytes = encoded(&gradient(64, 64).into(), ImageFormat::Jpeg);
    let length = u16::try_from(thumbnail.len() + 2).unwrap().to_be_bytes();
    let segment = [&[0xff, 0xe1][..], &length, &thumbnail].concat();
    bytes.splice(2..2, segment);
    assert_eq!(load(&bytes).unwrap().dimensions(), (64, 64));
    assert!(refusal(&bytes[..bytes.len() - 40]).contains("truncated"));
}

#[test]
fn small_pictures_are_refused() {
    for (width, height) in [(1, 1), (7, 100), (100, 7)] {
        let message = refusal(&encoded(&gradient(width, height).into(), ImageFormat::Png));
        assert!(
            message.contains(&format!("{width}×{height} pixels")),
            "{message}"
        );
    }
    load(&encoded(&gradient(8, 8).into(), ImageFormat::Png)).unwrap();
}

#[test]
fn huge_dimensions_are_refused_from_the_header() {
    let mut bytes = encoded(&gradient(16, 16).into(), ImageFormat::Bmp);
    bytes[18..26].copy_from_slice(&[30_000i32.to_le_bytes(), 30_000i32.to_le_bytes()].concat());
    let message = refusal(&bytes);
    assert!(message.contains("30000×30000 pixels"), "{message}");

    let mut bytes = Vec::new();
    let mut encoder = ::png::Encoder::new(&mut bytes, 60_000, 60_000);
    encoder.set_color(::png::ColorType::Rgb);
    drop(encoder.write_header().unwrap());
    bytes.truncate(33); // the signature and the header
    bytes.extend(b"\0\0\0\x04IDAT"); // and the start of the pixels
    let message = refusal(&bytes);
    assert!(message.contains("60000×60000 pixels"), "{message}");
}

#[test]
fn the_exif_orientation_is_applied() {
    let image = load_image(&golden("exif-6.jpg")).unwrap();
    assert_eq!(image.dimensions(), (16, 24));
    // Red, green / blue, white, turned clockwise: blue, red / white, green.
    for ((x, y), expected) in [
        ((3, 5), [20, 20, 220]),
        ((12, 5), [230, 20, 20]),
        ((3, 18), [240; 3]),
        ((12, 18), [20, 200, 20]),
    ] {
        assert_near(image.get_pixel(x, y).0, expected);
    }
}

#[test]
fn a_cmyk_jpeg_has_its_colours() {
    let image = load_image(&golden("cmyk.jpg")).unwrap();
    assert_eq!(image.dimensions(), (24, 16));
    for ((x, y), expected) in [
        ((5, 3), [230, 20, 20]),
        ((18, 3), [20, 200, 20]),
        ((5, 12), [20, 20, 220]),
        ((18, 12), [240; 3]),
    ] {
        assert_near(image.get_pixel(x, y).0, expected);
    }
}

/// Equal up to what JPEG loses.
fn assert_near(found: [u8; 3], expected: [u8; 3]) {
    for (a, b) in found.into_iter().zip(expected) {
        assert!(
            a.abs_diff(b) <= 12,
            "expected {expected:?}, found {found:?}"
        );
    }
}

#[test]
fn alpha_is_laid_over_white() {
    let pixels = [
        [10, 20, 30, 0],
        [10, 20, 30, 255],
        [0, 100, 200, 128],
        [255, 0, 0, 64],
    ];
    let image = ImageBuffer::from_fn(8, 8, |x, _| Rgba(pixels[x as usize % 4]));
    let image = load(&encoded(&DynamicImage::ImageRgba8(image), ImageFormat::Png)).unwrap();
    let row: Vec<[u8; 3]> = (0..4).map(|x| image.get_pixel(x, 0).0).collect();
    assert_eq!(
        row,
        [[255; 3], [10, 20, 30], [127, 177, 227], [255, 191, 191]]
    );
}

#[test]
fn grey_and_16_bit_pictures_become_rgb() {
    let cases: [(DynamicImage, [u8; 3]); 4] = [
        (
            DynamicImage::ImageLuma8(ImageBuffer::from_pixel(9, 9, Luma([77]))),
            [77; 3],
        ),
        (
            DynamicImage::ImageLumaA8(ImageBuffer::from_pixel(9, 9, LumaA([0, 128]))),
            [127; 3],
        ),
        (
            DynamicImage::ImageLuma16(ImageBuffer::from_pixel(9, 9, Luma([200 * 257]))),
            [200; 3],
        ),
        (
            DynamicImage::ImageRgb16(ImageBuffer::from_pixel(9, 9, Rgb([257, 2570, 65535]))),
            [1, 10, 255],
        ),
    ];
    for (image, expected) in cases {
        let found = load(&encoded(&image, ImageFormat::Png)).unwrap();
        assert_eq!(found.get_pixel(4, 4).0, expected);
    }
}

#[test]
fn fit_takes_the_middle_and_tensors_come_back() {
    // A red middle square between two blue margins.
    let wide = RgbImage::from_fn(60, 20, |x, _| {
        if (20..40).contains(&x) {
            Rgb([255, 0, 0])
        } else {
            Rgb([0, 0, 255])
        }
    });
    assert!(
        fit(&wide, 10, 10)
            .pixels()
            .all(|pixel| pixel.0 == [255, 0, 0])
    );
    let tall = ::image::imageops::rotate90(&wide);
    assert!(
        fit(&tall, 10, 10)
            .pixels()
            .all(|pixel| pixel.0 == [255, 0, 0])
    );

    let image = gradient(24, 16);
    let tensor = to_tensor(&image, [16, 24], &Device::flex());
    assert_eq!(tensor.dims(), [1, 3, 16, 24]);
    assert_eq!(to_image(tensor).unwrap(), image);
    let black = to_tensor(&RgbImage::new(8, 8), [8, 8], &Device::flex());
    assert_eq!(black.into_data().iter::<f32>().next(), Some(-1.0));
}

#[test]
fn a_tensor_with_nan_is_no_picture() {
    let tensor = Tensor::<4>::full([1, 3, 8, 8], f32::NAN, &Device::flex());
    assert!(matches!(to_image(tensor), Err(Error::NotFinite { .. })));
}

#[test]
fn values_outside_are_clamped() {
    let tensor = Tensor::<4>::full([1, 3, 8, 8], 1.7, &Device::flex());
    assert!(
        to_image(tensor)
            .unwrap()
            .pixels()
            .all(|pixel| pixel.0 == [255; 3])
    );
}

#[test]
fn png_text_comes_back_and_the_bytes_are_the_same_each_time() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("1.png"), folder.path().join("2.png"));
    let text = [("prompt", "un château – 雪 🏰"), ("seed", "7")];
    for path in [&one, &two] {
        save_png(path, &gradient(20, 10), &text).unwrap();
    }
    assert_eq!(load_image(&one).unwrap(), gradient(20, 10));
    let read = read_png_text(&one).unwrap();
    assert_eq!(
        read,
        text.map(|(key, text)| (key.to_owned(), text.to_owned()))
    );
    assert_eq!(std::fs::read(one).unwrap(), std::fs::read(two).unwrap());
    let refused = save_png(&folder.path().join("3.png"), &gradient(8, 8), &[("", "x")]);
    let message = refused.unwrap_err().to_string();
    assert!(
        message.ends_with("3.png: Invalid keyword size"),
        "{message}"
    );
    assert!(!folder.path().join("3.png").exists());
}

#[test]
fn resizing_equals_pillow() {
    let source = load_image(&golden("source.png")).unwrap();
    let expected = Weights::open(
        &golden("expected.safetensors"),
        &Device::flex(),
        FloatDType::F32,
    )
    .unwrap();
    let names = [
        "nearest", "lanczos", "bilinear", "bicubic", "box", "hamming",
    ];
    for (number, name) in (0..).zip(names) {
        for (width, height) in [(13, 9), (50, 40)] {
            let found = resize(&source, width, height, Filter::from_pillow(number).unwrap());
            let found = normalised_tensor(&found, |_, value| value, &Device::flex());
            let shape = [3, height as usize, width as usize];
            let expected = expected
                .tensor(&format!("{name}.{width}x{height}"), shape)
                .unwrap();
            let difference = (found.squeeze::<3>() - expected).abs();
            let differing = difference
                .clone()
                .greater_elem(0)
                .float()
                .sum()
                .into_scalar::<f32>();
            let largest = difference.max().into_scalar::<f32>();
            assert!(
                largest == 0.0,
                "{name} {width}×{height}: {differing} differ, by {largest}"
            );
        }
    }
}

/// Half a step of 8 bits, normalised, would be 7e-3; ours is the same arithmetic.
const PREPROCESS_TOLERANCE: f32 = 1e-5;

#[test]
fn preprocessing_equals_transformers() {
    let source = load_image(&golden("source.png")).unwrap();
    let expected = Weights::open(
        &golden("expected.safetensors"),
        &Device::flex(),
        FloatDType::F32,
    )
    .unwrap();
    for (name, size) in [
        ("clip", [24, 24]),
        ("clip_padded", [22, 20]),
        ("blip", [32, 32]),
    ] {
        let preprocessor = ImagePreprocessor::open(&golden(name)).unwrap();
        let found = preprocessor.apply(&source, &Device::flex());
        let expected = expected.tensor(name, [1, 3, size[0], size[1]]).unwrap();
        let difference = (found - expected).abs().max().into_scalar::<f32>();
        assert!(difference < PREPROCESS_TOLERANCE, "{name}: {difference}");
    }
}

#[test]
fn old_and_combined_preprocessor_configs_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("preprocessor_config.json");
    std::fs::write(
        &path,
        r#"{"size": 24, "crop_size": 20, "do_center_crop": true, "resample": 3}"#,
    )
    .unwrap();
    let old = ImagePreprocessor::open(folder.path()).unwrap();
    assert_eq!(
        old.apply(&gradient(60, 40), &Device::flex()).dims(),
        [1, 3, 20, 20]
    );

    std::fs::remove_file(&path).unwrap();
    let combined = r#"{"image_processor": {"size": 24, "image_processor_type": "BlipImageProcessor"}, "num_query_tokens": 4}"#;
    std::fs::write(folder.path().join("processor_config.json"), combined).unwrap();
    let blip = ImagePreprocessor::open(folder.path()).unwrap();
    assert_eq!(
        blip.apply(&gradient(60, 40), &Device::flex()).dims(),
        [1, 3, 24, 24]
    );

    std::fs::write(&path, r#"{"size": 24, "do_center_crop": true}"#).unwrap();
    let message = ImagePreprocessor::open(folder.path())
        .unwrap_err()
        .to_string();
    let expected =
        "field `crop_size`: expected a height and a width, since `do_center_crop` is true";
    assert!(message.contains(expected), "{message}");
    std::fs::write(&path, r#"{"size": "big"}"#).unwrap();
    let message = ImagePreprocessor::open(folder.path())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("preprocessor_config.json: field `size`: data did not match"),
        "{message}"
    );
}
