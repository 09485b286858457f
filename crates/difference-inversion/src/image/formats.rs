//! Recognises files that are not pictures, or pictures in unsupported formats.

use crate::util::foreign::lfs_pointer;

/// Names the format of a file by its first bytes, with what to do about it.
pub(super) fn named(bytes: &[u8]) -> Option<String> {
    let starts = |start: &[u8]| bytes.starts_with(start);
    let at = |place: usize, text: &[u8]| {
        bytes
            .get(place..)
            .is_some_and(|rest| rest.starts_with(text))
    };
    let format = match bytes {
        _ if at(4, b"ftyp") => return Some(of_brand(bytes)),
        _ if starts(b"\xff\x0a") || starts(b"\0\0\0\x0cJXL \r\n\x87\n") => "JPEG XL",
        _ if starts(b"\0\0\0\x0cjP  ") || starts(b"\xff\x4f\xff\x51") => "JPEG 2000",
        _ if starts(b"8BPS") => "Photoshop",
        _ if starts(b"gimp xcf") => "GIMP",
        _ if starts(b"%PDF") => "PDF",
        _ if starts(b"%!PS") => "PostScript",
        _ if starts(b"qoif") => "QOI",
        _ if starts(b"\x76\x2f\x31\x01") => "OpenEXR",
        _ if starts(b"#?RADIANCE") || starts(b"#?RGBE") => "Radiance HDR",
        _ if starts(b"DDS ") => "DDS",
        _ if starts(b"\0\0\x01\0") => "icon (ICO)",
        _ if starts(b"\x0a\x05\x01\x08") || starts(b"\x0a\x03\x01") => "PCX",
        _ if starts(b"\x01\xda") => "SGI",
        _ if is_netpbm(bytes) => "Netpbm (PPM, PGM or PBM)",
        _ if starts(b"icns") => "icon (ICNS)",
        _ if is_targa(bytes) => "Truevision TGA",
        _ if starts(b"FUJIFILMCCD-RAW")
            || starts(b"IIU\0")
            || starts(b"IIRO")
            || starts(b"IIRS") =>
        {
            return Some(raw());
        }
        _ => return other(bytes),
    };
    Some(converted(format))
}

/// What to do with a camera's raw photograph.
pub(super) fn raw() -> String {
    "a camera's raw photograph, which is not read; develop it, and save it as JPEG, PNG or TIFF"
        .to_owned()
}

pub(super) fn converted(format: &str) -> String {
    format!(
        "a picture in the format {format}, which is not read; convert it to PNG, such as with `magick FROM TO.png`"
    )
}

/// Names a file of the MP4 family, by its brands: the first, and those it is compatible with.
fn of_brand(bytes: &[u8]) -> String {
    let size = bytes[..4]
        .iter()
        .fold(0, |size, &byte| size << 8 | usize::from(byte));
    let brands = bytes
        .get(8..size.clamp(12, 256).min(bytes.len()))
        .unwrap_or_default();
    let has = |names: &[&[u8]]| {
        brands
            .as_chunks::<4>()
            .0
            .iter()
            .any(|brand| names.contains(&&brand[..]))
    };
    if has(&[b"avif", b"avis"]) {
        converted("AVIF")
    } else if has(&[
        b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1",
    ]) {
        converted("HEIC")
    } else if has(&[b"crx "]) {
        raw()
    } else {
        "a video, not a picture; save one of its frames as PNG".to_owned()
    }
}

/// Whether it is P1 to P7, followed by white space.
fn is_netpbm(bytes: &[u8]) -> bool {
    matches!(bytes, [b'P', b'1'..=b'7', space, ..] if space.is_ascii_whitespace())
}

/// Whether it is a Targa file: by its footer, which older files lack, or by a header that is possible for no other format
/// (kind of colours, kind of picture, depth).
fn is_targa(bytes: &[u8]) -> bool {
    if bytes.ends_with(b"TRUEVISION-XFILE.\0") {
        return true;
    }
    let Some(&[_, palette, kind, ..]) = bytes.first_chunk::<18>() else {
        return false;
    };
    let of_palette = matches!((palette, kind), (1, 1 | 9) | (0, 2 | 3 | 10 | 11));
    of_palette && matches!(bytes[16], 8 | 15 | 16 | 24 | 32) && bytes[17] & 0xc0 == 0
}

/// Names files that are commonly mistaken for pictures.
fn other(bytes: &[u8]) -> Option<String> {
    let start = &bytes[..bytes.len().min(1024)];
    let text = String::from_utf8_lossy(start);
    let text = text.trim_start_matches('\u{feff}').trim_start();
    if let Some(pointer) = lfs_pointer(text) {
        return Some(pointer);
    }
    let text = text.to_ascii_lowercase();
    if text.starts_with("#define ") && text.contains("_width ") {
        return Some(converted("X bitmap (XBM)"));
    }
    let what = if text.contains("<svg") {
        return Some(converted("SVG"));
    } else if text.starts_with("<!doctype html") || text.starts_with("<html") {
        "a web page, not a picture; save the picture itself"
    } else if text.starts_with('{') || text.starts_with('[') {
        "JSON, not a picture"
    } else if bytes.starts_with(b"PK\x03\x04") {
        "a ZIP archive, not a picture; unpack it, or export the picture as PNG"
    } else if bytes.get(8) == Some(&b'{') {
        "a safetensors file, not a picture"
    } else {
        return None;
    };
    Some(what.to_owned())
}
