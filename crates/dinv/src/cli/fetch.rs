//! From a model's name to its path, on this disk or downloaded from the Hub.

use std::collections::BTreeSet;
use std::env;
use std::path::{Path, PathBuf};

use difference_inversion::diffusion::family::Family;
use difference_inversion::diffusion::frozen::ModelPaths;
use difference_inversion::diffusion::model_files::ModelFiles;
use difference_inversion::hub::{CAPTIONER, Hub, ModelId, Survey, Wanted, joint_spaces};
use difference_inversion::method::delta::DeltaMode;
use difference_inversion::method::generate_config::AnalogyConfig;
use difference_inversion::method::prompt::{PromptConfig, PromptMode};
use difference_inversion::models::captioner::{CaptionerPlace, ServedCaptioner, ServerAddress};

use super::consent::{self, Order};
use super::flags::{General, ModelSettings};
use super::locate::{self, Location};
use super::terminal::Failure;
use super::watch::{self, Watcher};

/// The variable with the key of a server that writes captions.
pub(crate) const CAPTIONER_KEY: &str = "DINV_CAPTIONER_KEY";

/// The models that a command reads in addition to the diffusion model.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Needs {
    pub(crate) joint_spaces: bool,
    pub(crate) captioner: bool,
    /// Whether the diffusion model's own denoiser is not read.
    pub(crate) without_denoiser: bool,
}

impl Needs {
    /// What making prompts needs; `captions_given` means that no captions have to be made.
    pub(crate) fn of_prompts(captions_given: bool, config: &PromptConfig) -> Self {
        let mode = config.prompt_mode;
        Self {
            joint_spaces: matches!(mode, PromptMode::Optimised | PromptMode::CaptionOptimised),
            captioner: !captions_given
                && matches!(mode, PromptMode::Caption | PromptMode::CaptionOptimised),
            ..Self::default()
        }
    }

    /// What learning needs.
    pub(crate) fn of_learning(captions_given: bool, config: &AnalogyConfig) -> Self {
        let of_prompts = Self::of_prompts(captions_given, &config.prompt);
        let has_delta = config.learn.lambda_clip > 0.0;
        let of_delta = has_delta && config.learn.delta != DeltaMode::Image;
        let optimised = config.prompt.prompt_mode == PromptMode::Optimised;
        Self {
            joint_spaces: of_prompts.joint_spaces || has_delta,
            captioner: of_prompts.captioner || (optimised && of_delta && !captions_given),
            ..Self::default()
        }
    }

    /// What of it may have to be downloaded: not a captioner behind a server.
    fn to_download(self, settings: &ModelSettings) -> anyhow::Result<Self> {
        Ok(Self {
            captioner: self.captioner && settings.captioner_server()?.is_none(),
            ..self
        })
    }
}

/// Finds models, and downloads missing ones.
pub(crate) struct Fetcher<'a> {
    hub: Hub,
    watcher: &'a mut Watcher,
    /// Whether to look only at what is on disk.
    looks_only: bool,
    /// Whether to download without asking.
    yes: bool,
    /// The models that the user agreed to download.
    agreed: BTreeSet<ModelId>,
    /// The models that would have been downloaded.
    pub(crate) absent: Vec<ModelId>,
}

impl<'a> Fetcher<'a> {
    /// Downloads what is needed, and asks the user first unless `yes`.
    pub(crate) fn new(watcher: &'a mut Watcher, yes: bool) -> anyhow::Result<Self> {
        Ok(Self {
            hub: Hub::from_env()?,
            watcher,
            looks_only: false,
            yes,
            agreed: BTreeSet::new(),
            absent: Vec::new(),
        })
    }

    /// Downloads nothing.
    pub(crate) fn looking_only(watcher: &'a mut Watcher) -> anyhow::Result<Self> {
        Ok(Self {
            looks_only: true,
            ..Self::new(watcher, true)?
        })
    }

    /// The path of the diffusion model; without `--model`, the demo model's. The user is also asked about the downloads
    /// of `needs`.
    pub(crate) fn model(
        &mut self,
        settings: &ModelSettings,
        needs: Needs,
    ) -> anyhow::Result<PathBuf> {
        settings.device()?; // no download for a device that is not there,
        settings.dtype()?; // or for one that does not compute in this type
        settings.file_options()?;
        settings.check_there()?;
        settings.captioner_server()?;
        let encoders = settings.check_replacements()?;
        let location = match &settings.model {
            Some(name) => locate::locate(name)?,
            None => locate::demo()?,
        };
        let wanted = Wanted {
            variant: settings.variant.as_deref(),
            without_t5: settings.without_t5.unwrap_or(false),
            without_denoiser: needs.without_denoiser || settings.unet.is_some(),
            without_encoders: &encoders,
        };
        match location {
            Location::Disk(path) => Ok(path),
            Location::Hub(id) => {
                self.agree(&id, wanted, settings, needs)?;
                self.fetch(&id, wanted)
            }
        }
    }

    /// As `model`, for learning or applying differences: the model must draw from words only. Others are refused before
    /// their other parts are downloaded.
    pub(crate) fn model_of_words(
        &mut self,
        settings: &ModelSettings,
        needs: Needs,
    ) -> anyhow::Result<PathBuf> {
        let model = self.model(settings, needs)?;
        if settings.unet.is_none() {
            Family::of(&settings.files_before_download(&model)?)?.check_words_alone()?;
        }
        Ok(model)
    }

    /// The paths of everything else that the diffusion model at `model` needs.
    pub(crate) fn paths(
        &mut self,
        settings: &ModelSettings,
        model: PathBuf,
        needs: Needs,
    ) -> anyhow::Result<ModelPaths> {
        let mut paths = ModelPaths {
            options: settings.file_options_of(&model)?,
            model,
            ..ModelPaths::default()
        };
        let server = settings.captioner_server()?;
        self.agree_beside(settings, &paths, needs)?;
        if let Some(name) = &settings.tokenizer {
            paths.options.tokenizer = Some(self.find(name, Wanted::default())?);
        }
        // A single file takes its vocabulary from a joint space.
        let for_words = paths.model.is_file() && settings.tokenizer.is_none();
        for name in settings.clip.iter().flatten() {
            let needed = needs.joint_spaces || for_words;
            paths.clip.extend(self.find_if(name, needed)?);
        }
        if settings.clip.is_none() && (needs.joint_spaces || for_words) {
            let number = if needs.joint_spaces { usize::MAX } else { 1 };
            paths.clip = self.joint_spaces(&paths, number)?;
        }
        paths.captioner = match (server, &settings.captioner) {
            (Some(address), _) => Some(CaptionerPlace::Server(
                self.served(address, needs.captioner)?,
            )),
            (None, name) => {
                let folder = match name {
                    Some(name) => self.find_if(name, needs.captioner)?,
                    None if needs.captioner => self.captioner(settings, &paths)?,
                    None => None,
                };
                folder.map(CaptionerPlace::Folder)
            }
        };
        Ok(paths)
    }

    /// The server that writes captions; where they are needed, it is asked for its model unless one is named.
    fn served(&mut self, address: ServerAddress, needed: bool) -> anyhow::Result<ServedCaptioner> {
        let key = env::var(CAPTIONER_KEY).ok();
        let served = ServedCaptioner::new(address, key)?;
        if !needed {
            return Ok(served);
        }
        if self.looks_only {
            return Ok(served.clone().with_model().unwrap_or(served));
        }
        let address = served.address();
        if !address.is_loopback() {
            let unencrypted = if address.is_encrypted() {
                ""
            } else {
                ", unencrypted"
            };
            let host = address.authority();
            self.watcher.notice(&format!(
                "pictures are sent to {host}{unencrypted}, for their captions"
            ));
        }
        Ok(served.with_model()?)
    }

    /// The folder or file that a name stands for.
    fn find(&mut self, name: &Path, wanted: Wanted<'_>) -> anyhow::Result<PathBuf> {
        match locate::locate(name)? {
            Location::Disk(path) => Ok(path),
            Location::Hub(id) => self.fetch(&id, wanted),
        }
    }

    /// As `find`, but downloads nothing that is not needed.
    fn find_if(&mut self, name: &Path, needed: bool) -> anyhow::Result<Option<PathBuf>> {
        match locate::locate(name)? {
            Location::Disk(path) => Ok(Some(path)),
            Location::Hub(id) if needed => self.fetch(&id, Wanted::default()).map(Some),
            Location::Hub(_) => Ok(None),
        }
    }

    /// The joint spaces, at most `number`, of the text encoders of a model that brings none.
    fn joint_spaces(&mut self, paths: &ModelPaths, number: usize) -> anyhow::Result<Vec<PathBuf>> {
        let mut folders = Vec::new();
        if paths.clip_folders().iter().any(|folder| folder.is_dir()) {
            return Ok(folders);
        }
        for id in joint_spaces(&paths.files()?)?.iter().take(number) {
            folders.extend(self.fetch_beside(id)?);
        }
        Ok(folders)
    }

    /// The captioner of a model from the Hub; for a folder, the user names it.
    fn captioner(
        &mut self,
        settings: &ModelSettings,
        paths: &ModelPaths,
    ) -> anyhow::Result<Option<PathBuf>> {
        match self.captioner_of(settings, paths)? {
            Some(id) => self.fetch_beside(&id),
            None => Ok(None),
        }
    }

    /// The captioner that a model of the Hub takes from there, if it has none of its own.
    fn captioner_of(
        &self,
        settings: &ModelSettings,
        paths: &ModelPaths,
    ) -> anyhow::Result<Option<ModelId>> {
        let from_hub = match &settings.model {
            Some(name) => matches!(locate::locate(name)?, Location::Hub(_)),
            None => false,
        };
        let is_missing = from_hub && paths.captioner_folder().is_none();
        Ok(is_missing.then(|| CAPTIONER.parse()).transpose()?)
    }

    /// As `fetch`, for a model that the user did not name: if only looking, its absence is noted.
    fn fetch_beside(&mut self, id: &ModelId) -> anyhow::Result<Option<PathBuf>> {
        match self.fetch(id, Wanted::default()) {
            Err(_) if self.looks_only => {
                self.absent.push(id.clone());
                Ok(None)
            }
            fetched => fetched.map(Some),
        }
    }

    /// Asks the user whether a diffusion model of the Hub may be downloaded, with everything it needs.
    fn agree(
        &mut self,
        id: &ModelId,
        wanted: Wanted<'_>,
        settings: &ModelSettings,
        needs: Needs,
    ) -> anyhow::Result<()> {
        if self.looks_only || self.hub.offline || self.is_complete(id, wanted) {
            return Ok(());
        }
        let needs = needs.to_download(settings)?;
        let model = self.survey(id, wanted)?;
        let mut others = ids_of(settings.tokenizer.iter())?;
        if needs.joint_spaces {
            others.extend(match &settings.clip {
                Some(names) => ids_of(names.iter())?,
                None => model.joint_spaces,
            });
        }
        if needs.captioner {
            match &settings.captioner {
                Some(name) => others.extend(ids_of([name].into_iter())?),
                None if model.has_captioner => {}
                None => others.push(CAPTIONER.parse()?),
            }
        }
        let order = self.order(vec![(id.clone(), model.bytes)], others)?;
        self.ask(order)
    }

    /// Asks the user once whether all that goes with a diffusion model on this disk may be downloaded.
    fn agree_beside(
        &mut self,
        settings: &ModelSettings,
        paths: &ModelPaths,
        needs: Needs,
    ) -> anyhow::Result<()> {
        if self.looks_only || self.hub.offline {
            return Ok(());
        }
        let needs = needs.to_download(settings)?;
        let mut others = ids_of(settings.tokenizer.iter())?;
        if needs.joint_spaces {
            let is_there = || paths.clip_folders().iter().any(|folder| folder.is_dir());
            others.extend(match &settings.clip {
                Some(names) => ids_of(names.iter())?,
                None if is_there() => Vec::new(),
                None => joint_spaces(&paths.files()?)?,
            });
        }
        if needs.captioner {
            others.extend(match &settings.captioner {
                Some(name) => ids_of([name].into_iter())?,
                None => self.captioner_of(settings, paths)?.into_iter().collect(),
            });
        }
        let order = self.order(Vec::new(), others)?;
        match order.len() {
            0 => Ok(()),
            _ => self.ask(order),
        }
    }

    /// Adds to `order` those of the others that are absent and that the user has not been asked about.
    fn order(&mut self, mut order: Order, others: Vec<ModelId>) -> anyhow::Result<Order> {
        for other in others {
            let is_new = order.iter().all(|(id, _)| *id != other) && !self.agreed.contains(&other);
            if is_new && !self.is_complete(&other, Wanted::default()) {
                let bytes = self.survey(&other, Wanted::default())?.bytes;
                order.push((other, bytes));
            }
        }
        Ok(order)
    }

    /// Asks the user about downloads.
    fn ask(&mut self, order: Order) -> anyhow::Result<()> {
        consent::ask(&order, &self.hub.cache, self.yes, self.watcher)?;
        self.agreed.extend(order.into_iter().map(|(id, _)| id));
        Ok(())
    }

    fn survey(&mut self, id: &ModelId, wanted: Wanted<'_>) -> anyhow::Result<Survey> {
        let watcher = &mut *self.watcher;
        let observe = &mut |progress: &_| watcher.observe(progress);
        Ok(self.hub.survey(id, wanted, observe)?)
    }

    fn is_complete(&self, id: &ModelId, wanted: Wanted<'_>) -> bool {
        let cached = self.hub.cached(id, wanted);
        cached.is_some_and(|model| model.missing.is_empty())
    }

    /// The folder of a model of the Hub.
    fn fetch(&mut self, id: &ModelId, wanted: Wanted<'_>) -> anyhow::Result<PathBuf> {
        let cached = self.hub.cached(id, wanted);
        let missing = match cached {
            Some(model) if model.missing.is_empty() => return Ok(model.folder),
            Some(model) => model.missing,
            None => Vec::new(),
        };
        if self.looks_only {
            let message = if missing.is_empty() {
                format!("{id}: not downloaded")
            } else {
                format!(
                    "{id}: not downloaded as a whole: no {}",
                    missing.join(", no ")
                )
            };
            let hint = format!("download it with `dinv models pull {}`", locate::called(id));
            return Err(Failure::input(message).hint(hint).into());
        }
        if !self.hub.offline {
            if !self.agreed.contains(id) {
                let bytes = self.survey(id, wanted)?.bytes;
                self.ask(vec![(id.clone(), bytes)])?;
            }
            let cache = self.hub.cache.display();
            self.watcher.say(&format!("downloading {id} to {cache}"));
        }
        let watcher = &mut *self.watcher;
        let observe = &mut |progress: &_| watcher.observe(progress);
        Ok(self.hub.pull(id, wanted, observe)?)
    }
}

/// Downloads the demo model for its example, if it is published and not on this disk. `settings` are those of the run.
pub(crate) fn example(settings: &ModelSettings, general: &General) -> anyhow::Result<()> {
    let Location::Hub(id) = locate::demo()? else {
        return Ok(());
    };
    settings.device()?; // no download for a run that cannot begin
    settings.dtype()?;
    settings.file_options()?;
    watch::catch_interrupts()?;
    let mut watcher = Watcher::new(general.quiet);
    let mut fetcher = Fetcher::new(&mut watcher, general.yes)?;
    fetcher.fetch(&id, Wanted::default()).map(drop)
}

/// Where the models are as far as they are on this disk, and what would be downloaded.
pub(crate) fn on_disk(models: &ModelSettings) -> anyhow::Result<(ModelPaths, Vec<ModelId>)> {
    let mut watcher = Watcher::new(true);
    let mut fetcher = Fetcher::looking_only(&mut watcher)?;
    let model = fetcher.model(models, Needs::default())?;
    let files = ModelFiles::open(&model, &models.file_options_of(&model)?);
    let learns = files.map_or(true, |files| learns(&files));
    let needs = Needs {
        joint_spaces: learns,
        captioner: learns,
        ..Needs::default()
    };
    let paths = fetcher.paths(models, model, needs)?;
    Ok((paths, fetcher.absent))
}

/// Whether differences can be learned on a model, as far as its files state.
pub(crate) fn learns(files: &ModelFiles) -> bool {
    !Family::of(files).is_ok_and(Family::takes_picture)
}

/// The models of the Hub among those that names mean.
fn ids_of<'a>(names: impl Iterator<Item = &'a PathBuf>) -> anyhow::Result<Vec<ModelId>> {
    let ids = names.map(|name| match locate::locate(name)? {
        Location::Hub(id) => Ok(Some(id)),
        Location::Disk(_) => Ok(None),
    });
    ids.filter_map(Result::transpose).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_captioner_is_needed_where_captions_are_read() {
        let needed = |mode, delta, lambda_clip| {
            let mut config = AnalogyConfig::default();
            config.prompt.prompt_mode = mode;
            config.learn.delta = delta;
            config.learn.lambda_clip = lambda_clip;
            let learning = Needs::of_learning(false, &config).captioner;
            assert!(!Needs::of_learning(true, &config).captioner);
            [Needs::of_prompts(false, &config.prompt).captioner, learning]
        };
        use DeltaMode::{Image, Interpolated};
        use PromptMode::{Caption, Optimised, Text};
        assert_eq!(needed(Caption, Image, 0.0), [true, true]);
        assert_eq!(needed(Text, Interpolated, 0.1), [false, false]);
        assert_eq!(needed(Optimised, Interpolated, 0.1), [false, true]);
        assert_eq!(needed(Optimised, Image, 0.1), [false, false]);
        assert_eq!(needed(Optimised, Interpolated, 0.0), [false, false]);
    }
}
