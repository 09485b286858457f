//! Turns a request for a job into its files and commands.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::error::{ContextKind, ContextValue};
use difference_inversion::Error;
use difference_inversion::image::load_image;
use difference_inversion::util::files::HiddenFolder;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::cli;

use super::capabilities::{self, Flag};
use super::differences::{self, check_name};
use super::http::App;
use super::job::{Kind, Output, Run, Shows, State, Stored, now};
use super::models;
use super::problem::{Answer, Problem};
use super::store::Store;

/// The folder of the request's pictures, in the job's folder.
pub(crate) const INPUTS: &str = "inputs";
/// The folder of the results, in the job's folder.
pub(crate) const RESULTS: &str = "results";
/// The folder in which commands work, in the job's folder.
pub(crate) const WORK: &str = "work";
/// A copy of the applied difference, among the inputs.
pub(crate) const DIFFERENCE: &str = "difference.safetensors";
/// The maximum number of pairs, pictures and strengths of a request.
pub(super) const MOST: [usize; 3] = [16, 256, 32];
/// The maximum bytes of a caption or a prompt.
pub(super) const LONGEST_TEXT: usize = 10_000;

/// A request for a job.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Request {
    kind: Kind,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pairs: Vec<Pair>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    targets: Vec<Target>,
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    strengths: Option<Vec<f64>>,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    settings: Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<String>,
}

/// A and A′. Pictures are data URLs, or addresses of this server's own pictures.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair {
    a: String,
    a_prime: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    caption_a: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    caption_a_prime: Option<String>,
}

/// B.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Target {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    picture: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    caption: Option<String>,
}

/// The names of a request's pictures among the inputs.
#[derive(Debug, Default)]
struct Files {
    pairs: Vec<[String; 2]>,
    targets: Vec<String>,
    difference: bool,
}

/// Reads a request.
pub(crate) fn parse(body: &[u8]) -> Answer<Request> {
    read(body)
}

/// Reads an object, and names the field that is invalid.
pub(super) fn read<T: DeserializeOwned>(body: &[u8]) -> Answer<T> {
    let json = &mut serde_json::Deserializer::from_slice(body);
    let read = serde_path_to_error::deserialize(json);
    read.map_err(|error| {
        let path = error.path().to_string();
        let reason = error.inner().to_string();
        // serde's position says nothing about a request of one line.
        let reason = reason.split(" at line ").next().unwrap_or(&reason);
        match path.as_str() {
            "." | "?" => Problem::field("", format!("the request is not valid: {reason}")),
            _ => Problem::field(path.as_str(), format!("{path}: {reason}")),
        }
    })
}

/// Where a request comes from.
#[derive(Debug, Default)]
pub(crate) struct Origin<'a> {
    /// Its `Idempotency-Key`.
    pub(crate) key: Option<String>,
    /// The job that it repeats.
    pub(crate) again: Option<&'a str>,
    /// Whether a client waits for the job and nobody else.
    pub(crate) is_waited_for: bool,
}

/// Accepts a request: checks it, writes its files, and queues it.
pub(crate) fn accept(app: &App, mut request: Request, origin: Origin<'_>) -> Answer<Value> {
    let store = &app.store;
    let Origin {
        key,
        again,
        is_waited_for,
    } = origin;
    if let Some(known) = key.as_deref().and_then(|key| store.with_key(key)) {
        return Ok(known);
    }
    store.check_room(app.options.queue)?;
    request.check()?;
    let arguments = request.settings(app)?;
    let id = store.new_id();
    let jobs = store.jobs_folder();
    let folder = HiddenFolder::new(&jobs)?;
    let inputs = folder.path().join(INPUTS);
    fs::create_dir(&inputs).map_err(Error::io(&inputs))?;
    let old = again.map(|id| store.job_folder(id));
    let files = request.write(store, &inputs, &id, old.as_deref())?;
    let runs = request.runs(&files, &arguments, Path::new(""));
    for run in &runs {
        cli::check(&words(&run.arguments)).map_err(|error| request.complaint(&error))?;
    }
    let commands = request.runs(&files, &arguments, &store.job_folder(&id));
    if let (Some(old), Some(Some(checkpoint))) = (&old, runs.first().map(|run| &run.checkpoint))
        && old.join(checkpoint).is_file()
    {
        let to = folder.path().join(checkpoint);
        fs::create_dir_all(folder.path().join(WORK)).map_err(Error::io(&to))?;
        fs::copy(old.join(checkpoint), &to).map_err(Error::io(&to))?;
    }
    let learned = match again {
        Some(again) if runs.len() > 1 && request.kind == Kind::Analogy => {
            let place = folder.path().join(RESULTS);
            learned_before(store, again, &place)?
        }
        _ => None,
    };
    let stored = Stored {
        id: id.clone(),
        kind: request.kind,
        state: State::Queued,
        created: now(),
        started: None,
        finished: None,
        request: serde_json::to_value(&request)?,
        runs_done: usize::from(learned.is_some()),
        results: learned.into_iter().collect(),
        notes: Vec::new(),
        error: None,
        commands: shown(&commands, &store.job_folder(&id)),
        runs,
        is_waited_for,
        rank: 0,
        key,
        events: 0,
    };
    let place = store.job_folder(&id);
    folder.publish(&place)?;
    store.add(stored, app.options.queue).inspect_err(|_| {
        let _ = fs::remove_dir_all(&place); // without job.json, a leftover folder is ignored
    })
}

/// Copies the difference that a job has learned into the results of its repetition, and returns what it says of it.
fn learned_before(store: &Store, job: &str, results: &Path) -> Answer<Option<Value>> {
    let old = store.get(job)?.stored;
    let file = store.job_folder(job).join(RESULTS).join(DIFFERENCE);
    let told = old
        .results
        .into_iter()
        .find(|result| result["kind"] == "difference");
    let Some(told) = told.filter(|_| old.runs_done > 0 && file.is_file()) else {
        return Ok(None);
    };
    fs::create_dir_all(results).map_err(Error::io(results))?;
    fs::copy(&file, results.join(DIFFERENCE)).map_err(Error::io(&file))?;
    Ok(Some(told))
}

/// The commands as they are typed: one reads the difference where another has written it, and not among the results.
fn shown(runs: &[Run], folder: &Path) -> Vec<Vec<String>> {
    let [kept, written] = [RESULTS, WORK].map(|place| {
        let path = folder.join(place).join(DIFFERENCE);
        path.to_string_lossy().into_owned()
    });
    let typed = |argument: &String| match *argument == kept {
        true => written.clone(),
        false => argument.clone(),
    };
    let commands = runs
        .iter()
        .map(|run| run.arguments.iter().map(typed).collect::<Vec<_>>());
    commands.map(|arguments| words(&arguments)).collect()
}

/// A command line with the program's name.
fn words(arguments: &[String]) -> Vec<String> {
    let program = std::iter::once("dinv".to_owned());
    program.chain(arguments.iter().cloned()).collect()
}

impl Request {
    /// The model that the request names.
    pub(crate) fn model(&self) -> &str {
        let model = self.settings.get("model").and_then(Value::as_str);
        model.unwrap_or(cli::locate::DEMO)
    }

    /// Checks everything that does not depend on pictures and settings.
    fn check(&self) -> Answer<()> {
        let (pairs, targets) = match self.kind {
            Kind::Analogy => (1..=MOST[0], 1..=MOST[1]),
            Kind::Learn => (1..=MOST[0], 0..=0),
            Kind::Apply | Kind::Caption => (0..=0, 1..=MOST[1]),
            Kind::Generate | Kind::Download => (0..=0, 0..=0),
        };
        let counted = |field: &str, found: usize, expected: std::ops::RangeInclusive<usize>| {
            if expected.contains(&found) {
                return Ok(());
            }
            let kind = self.kind.name();
            let message = match (*expected.start(), *expected.end()) {
                (_, 0) => format!("`{kind}` takes no {field}"),
                (least, most) => {
                    format!("`{kind}` takes {least} to {most} {field}, found {found}")
                }
            };
            Err(Problem::field(field, message))
        };
        counted("pairs", self.pairs.len(), pairs)?;
        counted("targets", self.targets.len(), targets)?;
        let strengths = match self.kind {
            Kind::Apply => 1..=MOST[2],
            _ => 0..=0,
        };
        if let Some(given) = &self.strengths {
            counted("strengths", given.len(), strengths)?;
            if self.settings.contains_key("strength") {
                let message = "strengths are given twice: `strengths` and the setting `strength`";
                return Err(Problem::field("strengths", message));
            }
        }
        let takes = |field: &str, given: bool, may: bool, must: bool| match (given, may) {
            (true, false) => {
                let message = format!("`{}` takes no {field}", self.kind.name());
                Err(Problem::field(field, message))
            }
            (false, _) if must => Err(Problem::field(field, format!("{field} is missing"))),
            _ => Ok(()),
        };
        let kind = self.kind;
        let applies = kind == Kind::Apply;
        let learns = matches!(kind, Kind::Analogy | Kind::Learn);
        let draws = kind == Kind::Generate;
        takes(
            "difference",
            self.difference.is_some(),
            applies || draws,
            applies,
        )?;
        takes("name", self.name.is_some(), learns, false)?;
        takes("prompt", self.prompt.is_some(), draws, draws)?;
        if kind == Kind::Download {
            self.check_download()?;
        }
        if let Some(name) = &self.name {
            check_name(name, "name")?;
        }
        self.check_texts()?;
        self.check_captions()
    }

    /// Checks that a download names a model, which is no flag of its command.
    fn check_download(&self) -> Answer<()> {
        let field = "settings.model";
        match self.settings.get("model").and_then(Value::as_str) {
            None => Err(Problem::field(field, "model: the model is missing")),
            Some(name) if name.is_empty() || name.starts_with('-') || name.contains('\0') => {
                Err(Problem::field(
                    field,
                    format!("model: expected a name, found `{}`", name.escape_debug()),
                ))
            }
            Some(_) => Ok(()),
        }
    }

    /// Checks that captions and the prompt can be arguments of a command.
    fn check_texts(&self) -> Answer<()> {
        let of_pairs = self
            .pairs
            .iter()
            .flat_map(|pair| [&pair.caption_a, &pair.caption_a_prime]);
        let of_targets = self.targets.iter().map(|target| &target.caption);
        let texts = of_pairs
            .map(|text| ("pairs", text))
            .chain(of_targets.map(|text| ("targets", text)));
        for (field, text) in texts.chain([("prompt", &self.prompt)]) {
            let text = text.as_deref().unwrap_or_default();
            if text.contains('\0') {
                return Err(Problem::field(
                    field,
                    format!("{field}: text cannot hold the character 0"),
                ));
            }
            if text.len() > LONGEST_TEXT {
                let message = format!("{field}: a text has more than {LONGEST_TEXT} bytes");
                return Err(Problem::field(field, message));
            }
        }
        Ok(())
    }

    /// Checks captions: the program takes them for all pictures of a kind or for none.
    fn check_captions(&self) -> Answer<()> {
        let pairs = |caption: fn(&Pair) -> &Option<String>| {
            let given = self.pairs.iter().filter(|pair| caption(pair).is_some());
            (given.count(), self.pairs.len())
        };
        let targets = self
            .targets
            .iter()
            .filter(|target| target.caption.is_some());
        for (field, (given, all)) in [
            ("pairs", pairs(|pair| &pair.caption_a)),
            ("pairs", pairs(|pair| &pair.caption_a_prime)),
            ("targets", (targets.count(), self.targets.len())),
        ] {
            if given != 0 && given != all {
                let message = format!("{field}: captions are given for {given} of {all}");
                return Err(Problem::field(field, message).hint("give all of them or none"));
            }
        }
        if self.kind == Kind::Caption && self.targets.iter().any(|target| target.caption.is_some())
        {
            return Err(Problem::field(
                "targets",
                "`caption` makes captions and takes none",
            ));
        }
        Ok(())
    }

    /// The flags for the settings.
    fn settings(&self, app: &App) -> Answer<Vec<String>> {
        let known = capabilities::flags(self.kind);
        let mut arguments = Vec::new();
        for (name, value) in &self.settings {
            let field = format!("settings.{name}");
            if models::RESTRICTED.contains(&name.as_str()) {
                models::check(app, name, value)?;
            }
            if name == "model" && self.kind == Kind::Download {
                continue; // no flag of its command
            }
            let Some(flag) = known
                .iter()
                .find(|flag| flag.name == name.replace('_', "-"))
            else {
                let names = known.iter().map(|flag| flag.name.as_str());
                let near = names.max_by(|one, other| {
                    let like = |known| strsim::jaro_winkler(known, name);
                    like(one).total_cmp(&like(other))
                });
                let message = format!("`{}` has no setting `{name}`", self.kind.name());
                let problem = Problem::field(field, message);
                return Err(match near {
                    Some(near) => problem.hint(format!("did you mean `{near}`?")),
                    None => problem,
                });
            };
            arguments
                .extend(argument(flag, value).map_err(|message| Problem::field(field, message))?);
        }
        Ok(arguments)
    }

    /// Writes the pictures to `inputs`, and replaces them by their addresses.
    fn write(
        &mut self,
        store: &Store,
        inputs: &Path,
        id: &str,
        old: Option<&Path>,
    ) -> Answer<Files> {
        let mut files = Files::default();
        let keep = |text: &mut String, name: String, field: String| -> Answer<String> {
            let bytes = picture(store, text).map_err(|message| Problem::field(&field, message))?;
            let name = format!("{name}.{}", extension(&bytes));
            let path = inputs.join(&name);
            fs::write(&path, bytes).map_err(Error::io(&path))?;
            load_image(&path).map_err(|error| {
                let error = match error {
                    Error::InvalidFile { reason, .. } => anyhow::Error::msg(reason),
                    error => error.into(),
                };
                Problem::about(&field, &error)
            })?;
            *text = format!("/v1/jobs/{id}/files/{name}");
            Ok(name)
        };
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            let number = index + 1;
            let a = keep(
                &mut pair.a,
                format!("a{number}"),
                format!("pairs[{index}].a"),
            )?;
            let field = format!("pairs[{index}].a_prime");
            let a_prime = keep(&mut pair.a_prime, format!("a{number}-prime"), field)?;
            files.pairs.push([a, a_prime]);
        }
        for (index, target) in self.targets.iter_mut().enumerate() {
            let field = format!("targets[{index}].picture");
            files
                .targets
                .push(keep(&mut target.picture, format!("b{}", index + 1), field)?);
        }
        if let Some(name) = &self.difference {
            check_name(name, "difference")?;
            let kept = old
                .map(|old| old.join(INPUTS).join(DIFFERENCE))
                .filter(|path| path.is_file());
            let path = kept.unwrap_or_else(|| differences::path(store, name));
            if !path.is_file() {
                let message = format!("there is no difference `{name}`");
                return Err(
                    Problem::field("difference", message).hint("`GET /v1/differences` lists them")
                );
            }
            fs::copy(&path, inputs.join(DIFFERENCE)).map_err(Error::io(&path))?;
            files.difference = true;
        }
        Ok(files)
    }

    /// The command as in a terminal, except for its outputs, with paths below `base`.
    fn arguments(&self, files: &Files, settings: &[String], base: &Path) -> Vec<String> {
        let input = |name: &str| {
            let path = base.join(INPUTS).join(name);
            path.to_string_lossy().into_owned()
        };
        let mut arguments: Vec<String> =
            self.kind.words().iter().map(ToString::to_string).collect();
        match self.kind {
            Kind::Apply if files.difference => arguments.push(input(DIFFERENCE)),
            // Learned by the first command of the same job.
            Kind::Apply => {
                let path = base.join(RESULTS).join(DIFFERENCE);
                arguments.push(path.to_string_lossy().into_owned());
            }
            Kind::Download => arguments.push(self.model().to_owned()),
            _ => {}
        }
        for ([a, a_prime], pair) in files.pairs.iter().zip(&self.pairs) {
            arguments.push(format!("--a={}", input(a)));
            arguments.push(format!("--a-prime={}", input(a_prime)));
            let captions = [
                ("caption-a", &pair.caption_a),
                ("caption-a-prime", &pair.caption_a_prime),
            ];
            for (flag, caption) in captions {
                arguments.extend(
                    caption
                        .as_ref()
                        .map(|caption| format!("--{flag}={caption}")),
                );
            }
        }
        for (b, target) in files.targets.iter().zip(&self.targets) {
            arguments.push(match self.kind {
                Kind::Caption => input(b),
                _ => format!("--b={}", input(b)),
            });
            let caption = target.caption.as_ref();
            arguments.extend(caption.map(|caption| format!("--caption-b={caption}")));
        }
        arguments.extend(
            self.prompt
                .as_ref()
                .map(|prompt| format!("--prompt={prompt}")),
        );
        if files.difference && self.kind == Kind::Generate {
            arguments.push(format!("--difference={}", input(DIFFERENCE)));
        }
        arguments.extend_from_slice(settings);
        arguments
    }

    /// The commands for learning or for applying in an analogy with many B.
    fn part(&self, kind: Kind, files: &Files, settings: &[String], base: &Path) -> Vec<Run> {
        let known = capabilities::flags(kind);
        let is_known = |argument: &&String| {
            let name = argument.trim_start_matches('-').split('=').next();
            known.iter().any(|flag| Some(flag.name.as_str()) == name)
        };
        let settings: Vec<String> = settings.iter().filter(is_known).cloned().collect();
        let mut request = Self {
            kind,
            ..self.clone()
        };
        match kind {
            Kind::Learn => request.targets.clear(),
            _ => request.pairs.clear(),
        }
        request.runs(files, &settings, base)
    }

    /// The commands, with paths below `base`.
    fn runs(&self, files: &Files, settings: &[String], base: &Path) -> Vec<Run> {
        let place = |name: &str| {
            let path = base.join(WORK).join(name);
            path.to_string_lossy().into_owned()
        };
        let arguments = self.arguments(files, settings, base);
        let with = |more: Vec<String>| [arguments.clone(), more].concat();
        let work = |name: &str| Path::new(WORK).join(name);
        let output = |from: &str, name: &str, shows| Output {
            from: work(from),
            name: name.to_owned(),
            shows,
        };
        let shown = |target, strength| Some(Shows { target, strength });
        match self.kind {
            // `analogy` takes one B.
            Kind::Analogy if self.targets.len() > 1 => {
                let learning = self.part(Kind::Learn, files, settings, base);
                let applying = self.part(Kind::Apply, files, settings, base);
                [learning, applying].concat()
            }
            Kind::Analogy => vec![Run {
                arguments: with(vec![format!("--output={}", base.join(WORK).display())]),
                outputs: vec![
                    output("b_prime.png", "b_prime.png", shown(Some(0), None)),
                    output("sheet.png", "sheet.png", None),
                    output("loss.png", "loss.png", None),
                    output("difference.safetensors", "difference.safetensors", None),
                    output("run.json", "run.json", None),
                ],
                checkpoint: Some(work("checkpoint.safetensors")),
                claims: vec![work("checkpoint.safetensors")],
            }],
            Kind::Learn => vec![Run {
                arguments: with(vec![format!("--output={}", place(DIFFERENCE))]),
                outputs: vec![output(DIFFERENCE, DIFFERENCE, None)],
                checkpoint: Some(work("difference.checkpoint.safetensors")),
                claims: vec![work("difference.checkpoint.safetensors")],
            }],
            Kind::Generate => vec![Run {
                arguments: with(vec![format!("--output={}", place("picture.png"))]),
                outputs: vec![output("picture.png", "picture.png", shown(None, None))],
                checkpoint: None,
                claims: vec![work("picture.png")],
            }],
            Kind::Caption | Kind::Download => vec![Run {
                arguments,
                outputs: Vec::new(),
                checkpoint: None,
                claims: Vec::new(),
            }],
            Kind::Apply => {
                let strengths = match &self.strengths {
                    Some(strengths) => strengths.iter().copied().map(Some).collect(),
                    None => vec![None],
                };
                let of_strength = |(number, strength): (usize, Option<f64>)| {
                    let folder = format!("strength-{}", number + 1);
                    let mut more = vec![format!("--output={}", place(&folder))];
                    more.extend(strength.map(|strength| format!("--strength={strength}")));
                    more.push("--skip-existing".to_owned());
                    let strength = strength.or(self.strength());
                    let outputs = files.targets.iter().enumerate().map(|(target, b)| {
                        let stem = Path::new(b)
                            .file_stem()
                            .unwrap_or_default()
                            .to_string_lossy();
                        let strength = Some(strength.unwrap_or(1.0));
                        output(
                            &format!("{folder}/{stem}.png"),
                            &format!("{stem}-prime-{}.png", number + 1),
                            shown(Some(target), strength),
                        )
                    });
                    let outputs: Vec<Output> = outputs.collect();
                    let claims: Vec<PathBuf> =
                        outputs.iter().map(|output| output.from.clone()).collect();
                    Run {
                        arguments: with(more),
                        outputs,
                        checkpoint: None,
                        claims,
                    }
                };
                strengths.into_iter().enumerate().map(of_strength).collect()
            }
        }
    }

    /// The strength among the settings, which may be a text as on the command line.
    fn strength(&self) -> Option<f64> {
        let strength = self.settings.get("strength")?;
        let text = || strength.as_str()?.trim().parse().ok();
        strength.as_f64().or_else(text)
    }

    /// The problem that the program's own checks find in the settings of the request.
    fn complaint(&self, error: &anyhow::Error) -> Problem {
        let named = |name: &str| {
            let name = name.replace('_', "-");
            let given = self
                .settings
                .keys()
                .find(|given| given.replace('_', "-") == name);
            match given {
                Some(name) => format!("settings.{name}"),
                None if name == "strength" && self.strengths.is_some() => "strengths".to_owned(),
                None => "settings".to_owned(),
            }
        };
        if let Some(error) = error.downcast_ref::<clap::Error>() {
            let flag = match error.get(ContextKind::InvalidArg) {
                Some(ContextValue::String(flag)) => flag.clone(),
                Some(ContextValue::Strings(flags)) => flags.first().cloned().unwrap_or_default(),
                _ => String::new(),
            };
            let flag = flag.trim_start_matches('-');
            let flag: String = flag
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '-')
                .collect();
            let text = error.to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text);
            let text = text.split("\n\n").next().unwrap_or(text).trim();
            return Problem::field(named(&flag), text);
        }
        if let Some(Error::Setting { name, .. }) = error.downcast_ref::<Error>() {
            return Problem::about(named(name), error);
        }
        let text = error.to_string();
        let flag = text
            .strip_prefix("--")
            .and_then(|text| text.split(':').next());
        Problem::about(flag.map_or("settings".to_owned(), named), error)
    }
}

/// A setting as arguments.
fn argument(flag: &Flag, value: &Value) -> Result<Option<String>, String> {
    let name = &flag.name;
    let text = match value {
        Value::Null => return Ok(None),
        Value::Bool(given) if flag.is_switch => {
            return Ok(given.then(|| format!("--{name}")));
        }
        Value::String(text) if flag.is_switch && ["true", "false"].contains(&text.as_str()) => {
            return Ok((text == "true").then(|| format!("--{name}")));
        }
        _ if flag.is_switch => return Err(format!("{name}: expected true or false")),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) if text.contains('\0') => {
            return Err(format!("{name}: text cannot hold the character 0"));
        }
        Value::String(text) => text.clone(),
        _ => return Err(format!("{name}: expected a number, a text, true or false")),
    };
    Ok(Some(format!("--{name}={text}")))
}

/// The bytes of a picture in a request.
pub(crate) fn picture(store: &Store, text: &str) -> Result<Vec<u8>, String> {
    if let Some(data) = text.strip_prefix("data:") {
        let Some((kind, data)) = data.split_once(',') else {
            return Err("expected a data URL, found one without a comma".to_owned());
        };
        if !kind.ends_with(";base64") {
            return Err("expected a data URL in base64".to_owned());
        }
        let decoded = STANDARD.decode(data.trim());
        return decoded.map_err(|error| format!("this is not base64: {error}"));
    }
    let path = own_picture(store, text);
    let Some(path) = path.filter(|path| path.is_file()) else {
        return Err("expected a data URL (data:image/png;base64,…) or the address of a picture of this server"
            .to_owned());
    };
    fs::read(&path).map_err(|error| error.to_string())
}

/// The picture of this server at an address.
fn own_picture(store: &Store, address: &str) -> Option<PathBuf> {
    let parts: Vec<&str> = address.strip_prefix("/v1/")?.split('/').collect();
    match parts.as_slice() {
        ["jobs", id, "files", name] => {
            store.get(id).ok()?;
            super::http::job_file(store, id, name)
        }
        ["example", name] => capabilities::example(name),
        _ => None,
    }
}

/// The file extension for a picture's bytes; the program's decoder looks at the bytes, not at the name.
fn extension(bytes: &[u8]) -> &'static str {
    let format = image::guess_format(bytes).ok();
    let extensions = format.map(|format| format.extensions_str());
    extensions
        .and_then(|all| all.first().copied())
        .unwrap_or("bin")
}
