//! `dinv jobs`: the jobs of a running server, over its HTTP interface.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::Value;

use crate::cli::terminal::{self, Failure};

/// The time between two looks at a job.
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);
/// The maximum time that a server may take to answer.
const SILENCE: Duration = Duration::from_secs(30);

/// See, follow and cancel the jobs of a running `dinv serve`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  dinv jobs list
  dinv jobs watch 1a21f53c9c3
  dinv jobs cancel 1a21f53c9c3 --server http://studio:7865")]
pub(crate) struct JobsArgs {
    #[command(subcommand)]
    action: Action,
    /// Address of the server
    #[arg(
        long,
        global = true,
        value_name = "URL",
        default_value = "http://127.0.0.1:7865"
    )]
    server: String,
    /// Secret of the server [default: that of DINV_TOKEN]
    #[arg(long, global = true, value_name = "TOKEN")]
    token: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List all jobs, newest first
    #[command(after_help = "Example:\n  dinv jobs list")]
    List {
        /// At most N, besides the running one
        #[arg(long, value_name = "N", default_value_t = 50)]
        limit: usize,
        /// Print them as JSON, with all that the server knows
        #[arg(long)]
        json: bool,
    },
    /// Print a job as JSON
    #[command(after_help = "Example:\n  dinv jobs show 1a21f53c9c3")]
    Show(Job),
    /// Follow a job until it ends; fails if the job does
    #[command(after_help = "Example:\n  dinv jobs watch 1a21f53c9c3")]
    Watch(Job),
    /// Stop a job at its next step; a second time, immediately
    #[command(after_help = "Example:\n  dinv jobs cancel 1a21f53c9c3")]
    Cancel(Job),
    /// Move a waiting job to the front of the queue
    #[command(after_help = "Example:\n  dinv jobs first 1a21f53c9c3")]
    First(Job),
    /// Queue the request of a job again; learning resumes
    #[command(after_help = "Example:\n  dinv jobs retry 1a21f53c9c3")]
    Retry(Job),
    /// Remove a job that is not running, with its pictures
    #[command(after_help = "Example:\n  dinv jobs remove 1a21f53c9c3")]
    Remove(Job),
}

#[derive(Debug, Args)]
struct Job {
    /// The job, as `dinv jobs list` names it
    #[arg(value_name = "JOB")]
    id: String,
}

/// Does what is asked.
pub(crate) fn run(args: &JobsArgs) -> anyhow::Result<()> {
    let token = args
        .token
        .clone()
        .or_else(|| std::env::var("DINV_TOKEN").ok());
    let server = Server {
        address: args.server.trim_end_matches('/').to_owned(),
        token: token.filter(|token| !token.is_empty()),
        agent: ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(SILENCE))
            .build()
            .into(),
    };
    match &args.action {
        Action::List { json, limit } => {
            let found = server.get(&format!("/v1/jobs?limit={limit}"))?;
            if *json {
                return terminal::json(&found["jobs"]);
            }
            list(&found["jobs"])?;
            let shown = found["jobs"].as_array().map_or(0, Vec::len);
            match found["count"].as_u64() {
                Some(all) if all > shown as u64 => terminal::message(format_args!(
                    "{} older jobs are not shown; `--limit {all}` shows all",
                    all - shown as u64
                )),
                _ => {}
            }
            Ok(())
        }
        Action::Show(job) => terminal::json(&server.get(&job.address()?)?),
        Action::Watch(job) => watch(&server, job),
        Action::Cancel(job) => server.post(job, "cancel"),
        Action::First(job) => server.post(job, "first"),
        Action::Retry(job) => server.post(job, "retry"),
        Action::Remove(job) => server.ask("DELETE", &job.address()?).map(drop),
    }
}

impl Job {
    fn address(&self) -> Result<String, Failure> {
        if self.id.chars().all(|c| c.is_ascii_alphanumeric()) && !self.id.is_empty() {
            return Ok(format!("/v1/jobs/{}", self.id));
        }
        let message = format!("`{}` is not the name of a job", self.id);
        Err(Failure::usage(message).hint("`dinv jobs list` shows them"))
    }
}

/// A running server.
struct Server {
    address: String,
    token: Option<String>,
    agent: ureq::Agent,
}

impl Server {
    fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.ask("GET", path)
    }

    /// Changes a job, and prints what it then is.
    fn post(&self, job: &Job, action: &str) -> anyhow::Result<()> {
        let changed = self.ask("POST", &format!("{}/{action}", job.address()?))?;
        list(&Value::Array(vec![changed]))
    }

    /// The answer, `null` if it is empty.
    fn ask(&self, method: &str, path: &str) -> anyhow::Result<Value> {
        let url = format!("{}{path}", self.address);
        let request = ureq::http::Request::builder().method(method).uri(&url);
        let request = match &self.token {
            Some(token) => request.header("authorization", format!("Bearer {token}")),
            None => request,
        };
        let request = request.body(()).map_err(|error| {
            Failure::usage(format!("--server {}: {error}", self.address))
                .hint("an address is like http://127.0.0.1:7865")
        })?;
        let unreachable = |error: ureq::Error| {
            Failure::temporary(format!("cannot reach {}: {error}", self.address))
                .hint("check that `dinv serve` runs there, or name another address with `--server`")
        };
        let mut answer = self.agent.run(request).map_err(unreachable)?;
        let status = answer.status();
        let text = answer.body_mut().read_to_string().map_err(unreachable)?;
        let told: Value = serde_json::from_str(&text).unwrap_or_default();
        if status.is_success() {
            return Ok(told);
        }
        let message = told["error"]["message"].as_str().map(str::to_owned);
        let message = message.unwrap_or_else(|| format!("{url}: the server answered {status}"));
        let failure = Failure::new(message);
        Err(match told["error"]["hint"].as_str() {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
        .into())
    }
}

/// What a job is doing, in words.
fn doing(job: &Value) -> String {
    let progress = &job["progress"];
    match (progress["stage"].as_str(), job["position"].as_u64()) {
        (_, Some(position)) => format!("number {position} in the queue"),
        (Some(stage), None) => {
            let count = |field: &str| progress[field].as_u64().unwrap_or_default();
            let left = progress["seconds_left"].as_f64();
            let left = left.map_or_else(String::new, |left| format!(", {left:.0} s left"));
            format!("{stage} {} of {}{left}", count("step"), count("of"))
        }
        (None, None) => job["error"]["message"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
    }
}

/// Prints a line for each job.
fn list(jobs: &Value) -> anyhow::Result<()> {
    for job in jobs.as_array().into_iter().flatten() {
        let text = |field: &str| job[field].as_str().unwrap_or_default();
        let request = &job["request"];
        let name = request["name"].as_str().or(request["difference"].as_str());
        let name = name.or(request["settings"]["model"].as_str()); // such as of a download
        let (id, state, kind) = (text("id"), text("state"), text("kind"));
        let line = format!(
            "{id}  {state:9}  {kind:8}  {:20}  {}",
            name.unwrap_or_default(),
            doing(job)
        );
        terminal::line(line.trim_end())?;
    }
    Ok(())
}

/// Prints what a job is doing whenever that changes, and fails if the job does.
fn watch(server: &Server, job: &Job) -> anyhow::Result<()> {
    let mut last = String::new();
    loop {
        let now = server.get(&job.address()?)?;
        let state = now["state"].as_str().unwrap_or_default();
        let line = format!("{state} {}", doing(&now));
        if line != last {
            terminal::message(line.trim_end());
        }
        last = line;
        match state {
            "done" => {
                for result in now["results"].as_array().into_iter().flatten() {
                    if let Some(url) = result["url"].as_str() {
                        terminal::line(format_args!("{}{url}", server.address))?;
                    }
                }
                return Ok(());
            }
            "failed" | "cancelled" => {
                return Err(Failure::new(format!("job {}: {state}", job.id)).into());
            }
            _ => std::thread::sleep(BETWEEN_LOOKS),
        }
    }
}
