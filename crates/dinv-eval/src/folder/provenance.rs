//! What a result was made and measured with.

use std::collections::{BTreeMap, BTreeSet};

use difference_inversion::util::digest::sha256;
use serde_json::Value;

use super::{MethodRecord, ResultRecord, RunRecord};
use crate::measures::network_of;
use crate::{BUILT_IN, Scores};

/// The name of [`Entry::identity`](crate::suite::Entry::identity) among what a result was made
/// with.
pub(crate) const PICTURES: &str = "pictures";
/// The number of leading digits of a SHA-256 that are kept.
const DIGITS: usize = 12;

impl RunRecord {
    /// Everything that determines a method's results, by name: the program, the suite's words, seed,
    /// device, how files are interpreted, the method's settings, and the networks of the model it draws
    /// with. Long values are replaced by the first digits of their SHA-256.
    pub fn made_with(&self, method: &MethodRecord) -> BTreeMap<String, String> {
        let of_text = |text: &str| short(&sha256(text));
        let options = Value::Object(self.options.clone());
        let all = [
            ("program", self.program.clone()),
            ("suite", short(&self.suite.identity)),
            ("seed", self.seed.to_string()),
            ("device", self.device.clone()),
            ("options", of_text(&options.to_string())),
            ("method", method.method.clone()),
            ("settings", of_text(&method.settings.to_string())),
        ];
        // The settings of a skipped method are unknown.
        let known = |&(name, _): &(&str, String)| name != "settings" || !method.settings.is_null();
        let all = all.into_iter().filter(known);
        let all = all.map(|(name, value)| (name.to_owned(), value));
        let built_in = BUILT_IN.iter().find(|known| known.name == method.method);
        let networks = built_in.and_then(|known| self.models.get(known.model));
        let networks = networks.into_iter().flatten();
        all.chain(networks.map(|(network, hash)| (network.clone(), short(hash))))
            .collect()
    }
}

impl ResultRecord {
    /// The names whose values differ from `made_with`. Names that only one of them has do not count,
    /// such as a network that only other methods of a run read.
    pub fn made_otherwise<'a>(&'a self, made_with: &BTreeMap<String, String>) -> Vec<&'a str> {
        let differs = |(name, value): &(&String, &String)| {
            let other = made_with.get(*name);
            other.is_some_and(|other| other != *value)
        };
        let names = self.made_with.iter().filter(differs);
        names.map(|(name, _)| name.as_str()).collect()
    }

    /// The networks, of those with these file hashes, that it was not measured with: new ones and
    /// changed ones.
    pub fn not_measured_with<'a>(
        &self,
        measured_with: &'a BTreeMap<String, String>,
    ) -> BTreeSet<&'a str> {
        let networks = measured_with.keys().map(|file| network(file));
        networks
            .filter(|name| !files(measured_with, name).eq(files(&self.measured_with, name)))
            .collect()
    }

    /// Whether the same network, if any, measured this metric for both.
    pub(crate) fn measured_like(&self, other: &Self, metric: &str) -> bool {
        let networks = [&self.measured_with, &other.measured_with];
        network_of(metric).is_none_or(|name| {
            let [own, others] = networks.map(|measured_with| files(measured_with, name));
            own.eq(others)
        })
    }

    /// Replaces the scores of some networks, which have these file hashes; other scores stay.
    pub(crate) fn measured_again(
        &mut self,
        networks: &BTreeSet<&str>,
        measured_with: &BTreeMap<String, String>,
        scores: Scores,
    ) {
        let again = |network: Option<&str>| network.is_some_and(|one| networks.contains(one));
        self.scores.retain(|metric, _| !again(network_of(metric)));
        self.scores.extend(scores);
        self.measured_with
            .retain(|file, _| !again(Some(network(file))));
        let new = measured_with.iter();
        let new = new.filter(|(file, _)| again(Some(network(file))));
        self.measured_with
            .extend(new.map(|(file, hash)| (file.clone(), hash.clone())));
    }
}

/// Adds the networks of metrics that only `earlier` has.
pub(super) fn join(measures: &mut BTreeMap<String, String>, earlier: BTreeMap<String, String>) {
    let own: BTreeSet<String> = measures.keys().map(|file| network(file).into()).collect();
    measures.extend(
        earlier
            .into_iter()
            .filter(|(file, _)| !own.contains(network(file))),
    );
}

/// The network that a file belongs to: further files of a network are called `NETWORK (NUMBER)`.
fn network(file: &str) -> &str {
    file.split(' ').next().unwrap_or(file)
}

/// The files of a network, with their hashes.
fn files<'a>(
    all: &'a BTreeMap<String, String>,
    name: &str,
) -> impl Iterator<Item = (&'a String, &'a String)> {
    all.iter().filter(move |(file, _)| network(file) == name)
}

fn short(hash: &str) -> String {
    hash.chars().take(DIGITS).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::models::{INPAINTING, TEXT_TO_IMAGE};
    use crate::tiny;

    fn hashes(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let pairs = pairs.iter();
        pairs
            .map(|&(name, hash)| (name.to_owned(), hash.to_owned()))
            .collect()
    }

    #[test]
    fn only_networks_that_are_new_or_others_measure_again() {
        let judge_and_dino = hashes(&[("dino", "1"), ("dino (1)", "2"), ("judge", "3")]);
        let mut result = ResultRecord::begun(&tiny::entry(), 0, &judge_and_dino);
        let scores = |pairs: &[(&str, f64)]| -> Scores {
            let pairs = pairs.iter();
            pairs
                .map(|&(name, score)| (name.to_owned(), score))
                .collect()
        };
        result.scores = scores(&[("edit", 0.5), ("dino_direction", 0.25), ("ssim_b", 0.75)]);
        let missing = |measured_with: &[(&str, &str)]| {
            let measured_with = hashes(measured_with);
            let missing = result.not_measured_with(&measured_with);
            missing.into_iter().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(missing(&[]), "");
        assert_eq!(missing(&[("judge", "3")]), "");
        assert_eq!(missing(&[("judge", "4"), ("lpips", "5")]), "judge lpips");
        assert_eq!(missing(&[("dino", "1")]), "dino");

        let other = hashes(&[("dino", "1"), ("judge", "3"), ("lpips", "5")]);
        let networks = result.not_measured_with(&other);
        let new = scores(&[("dino_direction_raw", 1.0), ("lpips_b", 0.125)]);
        result.measured_again(&networks, &other, new);
        let kept = [
            ("dino_direction_raw", 1.0),
            ("edit", 0.5),
            ("lpips_b", 0.125),
            ("ssim_b", 0.75),
        ];
        assert_eq!(result.scores, scores(&kept));
        assert_eq!(result.measured_with, other);
    }

    #[test]
    fn networks_of_earlier_runs_stay_unless_there_are_others_now() {
        let mut measures = hashes(&[("dino", "1")]);
        let earlier = hashes(&[("dino", "2"), ("dino (1)", "3"), ("lpips", "4")]);
        join(&mut measures, earlier);
        assert_eq!(measures, hashes(&[("dino", "1"), ("lpips", "4")]));
    }

    #[test]
    fn what_a_method_does_not_read_does_not_decide_its_results() {
        let report = tiny::report(json!({"eta": 1}), &[("sky", Some(Vec::new()))]);
        let (mut run, mut method) = (report.run, report.methods[0].record.clone());
        let model = |role: &str, pairs: &[(&str, &str)]| (role.to_owned(), hashes(pairs));
        run.models = BTreeMap::from([
            model(TEXT_TO_IMAGE, &[("unet", "1234567890abcdef")]),
            model(INPAINTING, &[("unet", "f")]),
        ]);
        let mut result = ResultRecord::begun(&tiny::entry(), 0, &BTreeMap::new());
        assert!(result.made_otherwise(&run.made_with(&method)).is_empty());
        result.made_with = run.made_with(&method);
        assert_eq!(result.made_with["unet"], "1234567890ab");
        run.models = BTreeMap::from([
            model(
                TEXT_TO_IMAGE,
                &[("unet", "1234567890abcdef"), ("captioner", "2")],
            ),
            model(INPAINTING, &[("unet", "e")]),
        ]);
        run.measures = hashes(&[("judge", "3")]);
        assert!(result.made_otherwise(&run.made_with(&method)).is_empty());
        run.models = BTreeMap::from([model(TEXT_TO_IMAGE, &[("unet", "7")])]);
        run.device = "webgpu, f16".to_owned();
        method.settings = json!({"eta": 0});
        let otherwise = result.made_otherwise(&run.made_with(&method));
        assert_eq!(otherwise, ["device", "settings", "unet"]);
    }
}
