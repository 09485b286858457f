//! The local server of `dinv serve`: jobs on disk, workers that run them as this program's own commands, and HTTP.
//!
//! `http` is the interface (docs/guide/server.md), `safety` decides who may use it. `request` turns a request into the
//! commands of a job, `job` is the state of one, `store` keeps all of them in a folder, `worker` runs them in a
//! `process`, and `differences` is the library of learned differences, `models` the list of models. `doors` lets clients of other programs in.

mod capabilities;
mod differences;
mod doors;
mod http;
mod job;
mod models;
mod openapi;
mod problem;
mod process;
mod request;
mod safety;
mod store;
mod worker;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use difference_inversion::Error;
use difference_inversion::util::files::Claim;
use etcetera::BaseStrategy;

use crate::cli::signals;
use crate::cli::terminal::{self, Failure};

use self::job::Lane;
use self::store::Store;

/// The options of the server.
pub(crate) struct Options {
    pub(crate) listen: IpAddr,
    pub(crate) port: u16,
    /// `None` for the user's data folder.
    pub(crate) folder: Option<PathBuf>,
    pub(crate) token: Option<String>,
    /// Maximum bytes of a request.
    pub(crate) max_upload: u64,
    /// Maximum number of waiting jobs.
    pub(crate) queue: usize,
    pub(crate) allow_any_model: bool,
    /// How long models stay open after a job.
    pub(crate) keep: Duration,
    /// The autoencoder of previews.
    pub(crate) preview_vae: Option<PathBuf>,
}

/// The autoencoder of previews, from any folder.
fn preview_vae(options: &Options) -> anyhow::Result<Option<PathBuf>> {
    let path = options.preview_vae.as_deref();
    let path = path.map(|path| path.canonicalize().map_err(Error::io(path)));
    Ok(path.transpose()?)
}

/// Serves until a stop is requested.
pub(crate) fn run(options: Options) -> anyhow::Result<()> {
    options.check()?;
    let folder = options.folder()?;
    std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    let Some(_claim) = Claim::on(&folder.join("server"))? else {
        let message = format!("{}: another server uses this folder", folder.display());
        return Err(Failure::temporary(message)
            .hint("stop it, or choose another folder with `--dir`")
            .into());
    };
    let store = Arc::new(Store::open(&folder)?);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(8) // each keeps the memory of the pictures it has checked
        .enable_all()
        .build()?;
    let address = SocketAddr::new(options.listen, options.port);
    let listener = runtime.block_on(tokio::net::TcpListener::bind(address));
    let listener = listener.map_err(|error| {
        Failure::new(format!("cannot listen on {address}: {error}"))
            .hint("choose another port with `--port`; 0 takes a free one")
    })?;
    let address = listener.local_addr()?;
    signals::catch_interrupts()?;
    options.announce(address, &store)?;
    let (keep, preview_vae) = (options.keep, preview_vae(&options)?);
    let app = http::App::new(options, address, Arc::clone(&store));
    // A download keeps no models open.
    let lanes = [(Lane::Computing, keep), (Lane::Downloads, Duration::ZERO)];
    let workers = lanes.map(|(lane, keep)| {
        let store = Arc::clone(&store);
        let preview_vae = preview_vae.clone();
        std::thread::Builder::new()
            .name("jobs".to_owned())
            .spawn(move || worker::run(&store, lane, keep, preview_vae.as_deref()))
    });
    let workers = workers.into_iter().collect::<Result<Vec<_>, _>>()?;
    runtime.spawn(http::serve(listener, Arc::new(app)));
    while !signals::stopping() {
        std::thread::sleep(Duration::from_millis(50));
        // This thread is one of rayon's; on a machine with one core, the only one.
        let _ = rayon::yield_now();
    }
    store.stop_commands();
    for worker in workers {
        let _ = worker.join(); // a panic there has been printed
    }
    runtime.shutdown_timeout(Duration::from_millis(500));
    let (running, waiting) = store.unfinished();
    let what = match running + waiting {
        0 => "stopped".to_owned(),
        1 => "stopped; 1 unfinished job continues at the next start".to_owned(),
        jobs => format!("stopped; {jobs} unfinished jobs continue at the next start"),
    };
    Err(Failure::interrupted(what).into())
}

impl Options {
    fn check(&self) -> Result<(), Failure> {
        match &self.token {
            None if !self.listen.is_loopback() => {
                let message = format!(
                    "`--listen {}` lets other machines in: `--token` is missing",
                    self.listen
                );
                Err(Failure::usage(message)
                    .hint("choose a secret of at least 8 characters, in the variable DINV_TOKEN"))
            }
            Some(token)
                if token.len() < 8 || !token.bytes().all(|byte| byte.is_ascii_graphic()) =>
            {
                Err(Failure::usage(
                    "`--token`: expected at least 8 ASCII letters, digits or signs, without spaces",
                ))
            }
            _ => Ok(()),
        }
    }

    /// The folder of jobs and differences.
    fn folder(&self) -> anyhow::Result<PathBuf> {
        let folder = match &self.folder {
            Some(folder) => folder.clone(),
            None => match etcetera::choose_base_strategy() {
                Ok(places) => places.data_dir().join("dinv"),
                Err(_) => {
                    let failure = Failure::usage("this user has no home folder");
                    return Err(failure.hint("name a folder with `--dir`").into());
                }
            },
        };
        let folder = std::path::absolute(folder)?;
        if folder.to_str().is_none() {
            let message = format!(
                "{}: the name of the folder is not Unicode",
                folder.display()
            );
            return Err(Failure::usage(message)
                .hint("choose another folder with `--dir`")
                .into());
        }
        Ok(folder)
    }

    /// Prints the server's address and the folder of its data.
    fn announce(&self, address: SocketAddr, store: &Store) -> anyhow::Result<()> {
        terminal::line(format_args!("http://{address}/"))?;
        let (running, waiting) = store.unfinished();
        terminal::message(format_args!(
            "jobs and differences are kept in {}",
            store.folder.display()
        ));
        if running + waiting > 0 {
            terminal::message(format_args!(
                "unfinished jobs of an earlier run: {}; they continue",
                running + waiting
            ));
        }
        if !address.ip().is_loopback() {
            terminal::message(
                "note: this is plain HTTP: anyone who can read the network can read the token and the pictures; put a \
                 proxy with TLS in front of it",
            );
        }
        if self.token.is_some() {
            let host = match address.ip().is_unspecified() {
                true => "HOST".to_owned(),
                false => address.ip().to_string(),
            };
            let port = address.port();
            terminal::message(format_args!("open http://{host}:{port}/?token=TOKEN"));
        }
        terminal::message("Ctrl-C stops the server");
        Ok(())
    }
}
