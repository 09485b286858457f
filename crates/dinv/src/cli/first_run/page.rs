//! The page of a first run: one file with its pictures in it, which needs nothing else.

use std::fmt::Write;
use std::io::Cursor;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use difference_inversion::image::load_image;
use difference_inversion::util::files::write_atomically;
use dinv_eval::report::{COLOURS, escaped};
use image::codecs::jpeg::JpegEncoder;
use serde_json::Value;

use super::parts::duration;
use super::photos::Photos;
use super::report::{Check, FileFound, Outcome, Part, Report, Score, Strip};
use crate::cli::record::last_names;
use crate::cli::terminal::size;

/// The name of the page.
pub(super) const PAGE: &str = "report.html";

const TEMPLATE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
/// The quality of the pictures on the page, of 100. The lossless ones are next to it.
const QUALITY: u8 = 90;

/// Writes the page to the folder of the run.
pub(super) fn write(report: &Report, photos: &Photos, folder: &Path) -> anyhow::Result<()> {
    let data = serde_json::to_string(report)?.replace('<', "\\u003c");
    let [failed, off] = report.problems();
    let state = if failed + off == 0 { "good" } else { "bad" };
    let text = TEMPLATE
        .replace("{{style}}", &format!("{COLOURS}{STYLE}"))
        .replace("{{title}}", &escaped(&title(report)))
        .replace("{{state}}", state)
        .replace("{{verdict}}", &verdict(report))
        .replace("{{body}}", &body(report, photos, folder)?)
        .replace("{{data}}", &data);
    Ok(write_atomically(&folder.join(PAGE), text.as_bytes())?)
}

/// The result in a few words.
pub(super) fn verdict(report: &Report) -> String {
    let all = report.parts.len();
    let parts = if all == 1 {
        "1 part"
    } else {
        &format!("{all} parts")
    };
    let values = |count: usize| match count {
        1 => "1 value is not as expected".to_owned(),
        _ => format!("{count} values are not as expected"),
    };
    match report.problems() {
        [0, 0] => format!("{parts} done, every known value is as expected"),
        [0, off] => format!("{parts} done, {}", values(off)),
        [failed, 0] => format!("{failed} of {parts} failed"),
        [failed, off] => format!("{failed} of {parts} failed, {}", values(off)),
    }
}

fn title(report: &Report) -> String {
    let of = |name: &str| {
        report
            .made_with
            .get(name)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let model = last_names(of("model"));
    format!("First run of {model} on {}", of("device"))
}

fn body(report: &Report, photos: &Photos, folder: &Path) -> anyhow::Result<String> {
    let mut body = String::new();
    about(&mut body, report)?;
    for part in &report.parts {
        section(&mut body, part, photos, folder)?;
    }
    let settings = serde_json::to_string_pretty(&report.made_with)?;
    let machine = serde_json::to_string_pretty(&report.machine)?;
    for (name, text) in [("All settings", settings), ("The machine", machine)] {
        writeln!(
            body,
            "<details><summary>{name}</summary><pre tabindex=\"0\">{}</pre></details>",
            escaped(&text)
        )?;
    }
    Ok(body)
}

/// The machine and the model in a few lines.
fn about(body: &mut String, report: &Report) -> std::fmt::Result {
    let machine = |name: &str| plain(&report.machine[name]);
    let of = |name: &str| report.made_with.get(name).map(plain).unwrap_or_default();
    let seconds: f64 = report.parts.iter().map(|part| part.seconds).sum();
    let peak = report
        .parts
        .iter()
        .filter_map(|part| part.peak_memory)
        .max();
    let memory = report.machine["memory"]["total"]
        .as_u64()
        .map(|mib| size(mib << 20));
    let peak = peak.map_or("unknown".to_owned(), size);
    let lines = [
        ("program", of("program")),
        ("model", of("model")),
        (
            "device",
            format!("{}, {}, memory {}", of("device"), of("dtype"), of("memory")),
        ),
        ("GPU", machine("adapter")),
        (
            "system",
            format!(
                "{}, {}, {} threads, {} of memory",
                machine("system"),
                machine("architecture"),
                machine("threads"),
                memory.unwrap_or_default()
            ),
        ),
        (
            "time",
            match report.estimate {
                Some(estimate) => format!(
                    "{} in all; learning and applying were estimated at {}",
                    duration(seconds),
                    duration(estimate)
                ),
                None => duration(seconds),
            },
        ),
        ("peak memory", format!("{peak}, without that of the GPU")),
    ];
    body.push_str("<dl>\n");
    for (name, text) in lines.iter().filter(|(_, text)| !text.is_empty()) {
        writeln!(body, "<dt>{name}</dt><dd>{}</dd>", escaped(text))?;
    }
    body.push_str("</dl>\n");
    Ok(())
}

fn section(body: &mut String, part: &Part, photos: &Photos, folder: &Path) -> anyhow::Result<()> {
    let off = part.off().count();
    let (state, word) = match (&part.outcome, off) {
        (Outcome::Failed { .. }, _) => ("bad", "failed"),
        (Outcome::Done, 0) => ("good", "done"),
        (Outcome::Done, _) => ("bad", "not as expected"),
    };
    writeln!(
        body,
        "<section id=\"{}\">\n<div class=\"head\"><h2>{}</h2><span class=\"{state}\">{word}</span></div>",
        escaped(&part.name),
        escaped(&part.title)
    )?;
    let mut facts = vec![format!("{:.1} s", part.seconds)];
    facts.extend(
        part.stages
            .iter()
            .map(|(stage, seconds)| format!("{stage} {seconds:.1} s")),
    );
    facts.extend(
        part.peak_memory
            .map(|bytes| format!("peak memory {}", size(bytes))),
    );
    writeln!(
        body,
        "<p class=\"quiet\">{}</p>",
        escaped(&facts.join(" · "))
    )?;
    if let Outcome::Failed { message, hint } = &part.outcome {
        writeln!(body, "<div class=\"error\"><p>{}</p>", escaped(message))?;
        if let Some(hint) = hint {
            writeln!(body, "<p>{}</p>", escaped(hint))?;
        }
        body.push_str("</div>\n");
    }
    let notices = &part.notices;
    if !notices.is_empty() {
        body.push_str("<ul>\n");
        for notice in notices {
            writeln!(body, "<li>{}</li>", escaped(notice))?;
        }
        body.push_str("</ul>\n");
    }
    checks(body, &part.found.checks)?;
    files(body, &part.found.files)?;
    for strip in &part.found.strips {
        self::strip(body, strip, photos, folder)?;
    }
    body.push_str("</section>\n");
    Ok(())
}

fn checks(body: &mut String, checks: &[Check]) -> std::fmt::Result {
    if checks.is_empty() {
        return Ok(());
    }
    let is_known = checks.iter().any(|check| check.expected.is_some());
    body.push_str("<table class=\"checks\"><thead><tr><th>what</th><th>found</th>");
    body.push_str(if is_known {
        "<th>expected</th></tr></thead>\n"
    } else {
        "</tr></thead>\n"
    });
    for check in checks {
        let class = match check.ok {
            Some(true) => " class=\"good\"",
            Some(false) => " class=\"bad\"",
            None => "",
        };
        write!(
            body,
            "<tr><td>{}</td><td data-is=\"found\"{class}>{}</td>",
            escaped(&check.what),
            escaped(&plain(&check.found))
        )?;
        match &check.expected {
            Some(expected) => write!(
                body,
                "<td data-is=\"expected\">{}<small>{}</small></td>",
                escaped(&plain(expected)),
                escaped(check.source.as_deref().unwrap_or_default())
            )?,
            None if is_known => body.push_str("<td></td>"),
            None => {}
        }
        body.push_str("</tr>\n");
    }
    body.push_str("</table>\n");
    Ok(())
}

fn files(body: &mut String, files: &[FileFound]) -> std::fmt::Result {
    if files.is_empty() {
        return Ok(());
    }
    body.push_str("<table class=\"checks\"><thead><tr><th>part</th><th>size</th><th>file and SHA-256</th></tr></thead>\n");
    for file in files {
        writeln!(
            body,
            "<tr><td>{}</td><td data-is=\"size\">{}</td><td>{}<small>{}</small></td></tr>",
            escaped(&file.part),
            size(file.bytes),
            escaped(&file.path),
            file.sha256
        )?;
    }
    body.push_str("</table>\n");
    Ok(())
}

fn strip(body: &mut String, strip: &Strip, photos: &Photos, folder: &Path) -> anyhow::Result<()> {
    writeln!(
        body,
        "<h3>{}</h3>\n<div class=\"strip\">",
        escaped(&strip.title)
    )?;
    for shown in &strip.pictures {
        let label = escaped(&shown.label);
        let data = match inlined(&photos.path(shown, folder)) {
            Ok(data) => data,
            Err(error) => {
                writeln!(
                    body,
                    "<p class=\"error\">{label}: {}</p>",
                    escaped(&error.to_string())
                )?;
                continue;
            }
        };
        writeln!(
            body,
            "<figure><img src=\"data:image/jpeg;base64,{data}\" alt=\"{label}\"><figcaption>{label}</figcaption></figure>"
        )?;
    }
    body.push_str("</div>\n");
    scores(body, &strip.scores)?;
    Ok(())
}

fn scores(body: &mut String, scores: &[Score]) -> std::fmt::Result {
    if scores.is_empty() {
        return Ok(());
    }
    body.push_str("<table class=\"scores\"><thead><tr><th>metric</th><th>made</th><th>unchanged</th></tr></thead>\n");
    for score in scores {
        let arrow = if score.higher_is_better { "↑" } else { "↓" };
        let unchanged = score
            .unchanged
            .map_or(String::new(), |value| format!("{value:.3}"));
        let better = score
            .unchanged
            .is_some_and(|unchanged| match score.higher_is_better {
                true => score.made > unchanged,
                false => score.made < unchanged,
            });
        let class = if better { " class=\"good\"" } else { "" };
        writeln!(
            body,
            "<tr><td>{} {arrow}</td><td{class}>{:.3}</td><td>{unchanged}</td></tr>",
            escaped(&score.title),
            score.made
        )?;
    }
    body.push_str("</table>\n");
    Ok(())
}

/// A picture as JPEG in base64. One that is a JPEG already is taken as it is.
fn inlined(path: &Path) -> anyhow::Result<String> {
    if path.extension().is_some_and(|extension| extension == "jpg") {
        return Ok(STANDARD.encode(std::fs::read(path)?));
    }
    let mut bytes = Cursor::new(Vec::new());
    load_image(path)?.write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, QUALITY))?;
    Ok(STANDARD.encode(bytes.into_inner()))
}

/// A value for people.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}
