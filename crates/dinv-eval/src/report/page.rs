//! The page with the pictures: one file that works from the disk, next to the pictures.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{Group, Report, Summary};
use crate::{Better, Folder, METRICS, Status};

const PAGE: &str = include_str!("page.html");
/// The colours of pages that the program writes, by light and by dark.
pub const COLOURS: &str = include_str!("colours.css");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

impl Report {
    pub(super) fn page(&self, summaries: &[(Group, Vec<Summary>)]) -> String {
        let data = self.page_data(summaries).to_string();
        // Prevents names and captions from ending the script.
        let data = data.replace('<', "\\u003c");
        PAGE.replace("{{style}}", &format!("{COLOURS}{STYLE}"))
            .replace("{{script}}", SCRIPT)
            .replace("{{title}}", &escaped(&self.title()))
            .replace("{{data}}", &data)
    }

    fn page_data(&self, summaries: &[(Group, Vec<Summary>)]) -> Value {
        let metrics = METRICS.iter().map(|metric| {
            json!({
                "name": metric.name, "title": metric.title,
                "higher": metric.better == Better::Higher,
            })
        });
        let methods = self.methods.iter().map(|method| {
            json!({
                "name": method.record.name,
                "told": method.record.told.map(|told| told.to_string()),
                "skipped": method.record.skipped,
            })
        });
        let groups = summaries.iter().map(|(group, summaries)| {
            let rows = summaries.iter().map(|summary| {
                let scores: Map<String, Value> = (summary.scores.iter())
                    .map(|(name, e)| ((*name).to_owned(), json!([e.mean, e.low, e.high, e.count])))
                    .collect();
                json!({
                    "method": summary.method, "solved": summary.solved,
                    "failed": summary.failed, "seconds": summary.seconds,
                    "evaluations": summary.evaluations,
                    "memory": summary.peak_memory, "scores": scores,
                })
            });
            json!({ "title": group.counted(summaries), "rows": rows.collect::<Vec<_>>() })
        });
        json!({
            "seed": self.run.seed, "program": self.run.program,
            "metrics": metrics.collect::<Vec<_>>(),
            "methods": methods.collect::<Vec<_>>(),
            "groups": groups.collect::<Vec<_>>(),
            "analogies": self.analogies(),
        })
    }

    /// Every analogy with each method's result.
    fn analogies(&self) -> Vec<Value> {
        let mut analogies: BTreeMap<&str, (Value, Map<String, Value>)> = BTreeMap::new();
        for method in &self.methods {
            let method_name = &method.record.name;
            for result in &method.results {
                let name = result.name.as_str();
                let (_, results) = analogies.entry(name).or_insert_with(|| {
                    let pictures = ["a", "a_prime", "b", "b_prime"];
                    let pictures = pictures.map(|picture| Folder::picture_name(name, picture));
                    let about = json!({
                        "name": name, "kind": result.kind, "edit": result.edit, "pictures": pictures,
                    });
                    (about, Map::new())
                });
                let made = match &result.status {
                    Status::Done => json!({
                        "picture": Folder::b_prime_name(method_name, name),
                        "seconds": result.seconds, "scores": result.scores,
                    }),
                    Status::Failed(reason) => json!({ "failed": reason }),
                };
                results.insert(method_name.clone(), made);
            }
        }
        let together = analogies.into_values().map(|(mut about, results)| {
            let mut all = results.values();
            about["truth"] = json!(all.any(|made| made["scores"].get("mse_truth").is_some()));
            about["results"] = Value::Object(results);
            about
        });
        together.collect()
    }
}

/// Escapes a text for HTML.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
