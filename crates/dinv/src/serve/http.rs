//! The HTTP interface (docs/guide/server.md).

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, Seek};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path as Named, Query, Request as Asked, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use difference_inversion::Error;
use difference_inversion::image::read_png_text;
use difference_inversion::util::files::HiddenFolder;
use futures_util::{Stream, StreamExt, stream};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde_json::{Value, json as object};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_io_timeout::TimeoutStream;
use tokio_util::io::ReaderStream;

use crate::cli::names::{unused, without_reserved};
use crate::cli::terminal;

use super::Options;
use super::capabilities;
use super::differences::{self, Wish};
use super::doors;
use super::job::Kind;
use super::models;
use super::openapi;
use super::problem::{Answer, Problem};
use super::request::{self, INPUTS, Origin, RESULTS};
use super::safety;
use super::store::Store;

/// The maximum time between two pieces of a client's data.
const PATIENCE: Duration = Duration::from_secs(30);
/// The maximum number of clients served at once.
const CLIENTS: usize = 256;
/// The maximum number of clients that follow jobs, which leaves places for the others.
const FOLLOWERS: usize = 128;
/// The bytes of a file that are read at once.
const PIECE: usize = 64 << 10;
/// The minimum time between two events of a running job.
pub(super) const BETWEEN_EVENTS: Duration = Duration::from_millis(250);

const PAGE: &str = include_str!("page/index.html");
const STYLE: &str = include_str!("page/style.css");
const SCRIPT: &str = include_str!("page/app.js");

/// The state shared by all requests.
pub(crate) struct App {
    pub(crate) options: Options,
    address: SocketAddr,
    pub(crate) store: Arc<Store>,
    followers: Arc<Semaphore>,
    /// Only one request with pictures is checked at a time, since they are decoded and a place in the queue is for one.
    checking: Arc<tokio::sync::Mutex<()>>,
}

pub(super) type Shared = State<Arc<App>>;

impl App {
    pub(crate) fn new(options: Options, address: SocketAddr, store: Arc<Store>) -> Self {
        Self {
            options,
            address,
            store,
            followers: Arc::new(Semaphore::new(FOLLOWERS)),
            checking: Arc::default(),
        }
    }
}

/// Answers clients.
pub(crate) async fn serve(listener: tokio::net::TcpListener, app: Arc<App>) {
    let router = router(app);
    let places = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await; // such as too many open files
            continue;
        };
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let mut server = hyper::server::conn::http1::Builder::new();
            server
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE);
            // A client that asks and does not read is given up.
            let mut stream = TimeoutStream::new(stream);
            stream.set_write_timeout(Some(PATIENCE));
            let stream = TokioIo::new(Box::pin(stream));
            // Ignored: the client may have disconnected.
            let _ = server.serve_connection(stream, service).await;
            drop(place);
        });
    }
}

fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/style.css", get(|| async { asset("text/css", STYLE) }))
        .route(
            "/app.js",
            get(|| async { asset("text/javascript", SCRIPT) }),
        )
        .route(openapi::ADDRESS, get(get_description))
        .route("/v1/capabilities", get(get_capabilities))
        .route("/v1/example/{name}", get(get_example))
        .route("/v1/models", get(get_models))
        .route("/v1/read-png", post(read_png))
        .route("/v1/jobs", get(get_jobs).post(post_job))
        .route("/v1/jobs/{id}", get(get_job).delete(delete_job))
        .route("/v1/jobs/{id}/events", get(get_events))
        .route("/v1/jobs/{id}/cancel", post(cancel_job))
        .route("/v1/jobs/{id}/first", post(put_first))
        .route("/v1/jobs/{id}/retry", post(retry_job))
        .route("/v1/jobs/{id}/files/{name}", get(get_file))
        .route("/v1/jobs/{id}/zip", get(get_zip))
        .route("/v1/differences", get(get_differences))
        .route(
            "/v1/differences/{name}",
            get(get_difference)
                .put(put_difference)
                .patch(patch_difference)
                .delete(delete_difference),
        )
        .route("/v1/differences/{name}/thumbnail", get(get_thumbnail))
        .route("/v1/differences/{name}/exports", get(get_exports))
        .route(
            "/v1/differences/{name}/exports/{format}/{file}",
            get(get_exported),
        )
        .route("/v1/images/edits", post(doors::image_edits))
        .route("/sdapi/v1/img2img", post(doors::img2img))
        .fallback(|| async { Problem::not_found("address") })
        .method_not_allowed_fallback(|| async {
            Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "this address does not take this method",
            )
        })
        .layer(middleware::from_fn_with_state(Arc::clone(&app), guard))
        .with_state(app)
}

/// Wraps every request: checks the client, sets headers, and logs a line.
async fn guard(State(app): Shared, asked: Asked, next: Next) -> Response {
    let started = Instant::now();
    let (method, path) = (asked.method().clone(), asked.uri().path().to_owned());
    let token = app.options.token.as_deref();
    let checked = safety::check(&method, asked.headers(), app.address.ip(), token);
    let mut response = match (entry(&app, &asked), checked) {
        (Some(entry), _) => entry,
        (None, Ok(())) => next.run(asked).await,
        (None, Err(problem)) => problem.into_response(),
    };
    let headers = response.headers_mut();
    headers.extend(safety::headers());
    if !headers.contains_key(header::CACHE_CONTROL) {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    // The page's frequent reads would drown the other lines.
    if method != Method::GET
        || response.status().is_client_error()
        || response.status().is_server_error()
    {
        terminal::message(format_args!(
            "{method} {} {} {} ms",
            path.escape_debug(),
            response.status().as_u16(),
            started.elapsed().as_millis()
        ));
    }
    response
}

/// Handles the link with the token, which becomes a cookie and disappears from the address.
fn entry(app: &App, asked: &Asked) -> Option<Response> {
    let expected = app.options.token.as_deref()?;
    if asked.method() != Method::GET || asked.uri().path() != "/" {
        return None;
    }
    let mut pairs = asked.uri().query()?.split('&');
    let given = pairs.find_map(|pair| pair.strip_prefix("token="))?;
    // Not as forms are decoded, where a plus is a space: the link is typed with the token as it is.
    let given = percent_decode_str(given).decode_utf8().ok()?;
    safety::same(&given, expected).then(|| {
        let headers = [
            (header::LOCATION, "/".to_owned()),
            (header::SET_COOKIE, safety::cookie(expected)),
        ];
        (StatusCode::SEE_OTHER, headers).into_response()
    })
}

/// A JSON answer.
pub(crate) fn json(status: StatusCode, body: &Value) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json")];
    (status, headers, body.to_string()).into_response()
}

pub(super) fn ok(body: &Value) -> Response {
    json(StatusCode::OK, body)
}

fn accepted(job: &Value) -> Response {
    let mut response = json(StatusCode::ACCEPTED, job);
    let address = format!("/v1/jobs/{}", job["id"].as_str().unwrap_or_default());
    if let Ok(address) = HeaderValue::from_str(&address) {
        response.headers_mut().insert(header::LOCATION, address);
    }
    response
}

fn asset(kind: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, format!("{kind}; charset=utf-8")),
        (header::CACHE_CONTROL, "no-cache".to_owned()),
    ];
    (headers, text).into_response()
}

async fn page() -> Response {
    asset("text/html", PAGE)
}

/// Runs slow work where it does not block clients.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Answer<T> + Send + 'static,
) -> Answer<T> {
    tokio::task::spawn_blocking(work).await?
}

/// The body of a request, up to the limit.
pub(super) async fn body(app: &App, headers: &HeaderMap, body: Body) -> Answer<Vec<u8>> {
    let most = app.options.max_upload;
    let too_large = || {
        Problem::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the request is larger than {}", terminal::size(most)),
        )
        .hint("send smaller pictures, or start the server with a larger `--max-upload`")
    };
    let length = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok());
    if length
        .and_then(|length| length.parse().ok())
        .is_some_and(|length: u64| length > most)
    {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    let mut pieces = body.into_data_stream();
    loop {
        let piece = tokio::time::timeout(PATIENCE, pieces.next())
            .await
            .map_err(|_| {
                Problem::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "the rest of the request did not arrive",
                )
            })?;
        let Some(piece) = piece else {
            return Ok(bytes);
        };
        let piece =
            piece.map_err(|error| Problem::new(StatusCode::BAD_REQUEST, error.to_string()))?;
        if (bytes.len() + piece.len()) as u64 > most {
            return Err(too_large());
        }
        bytes.extend_from_slice(&piece);
    }
}

/// A file as an answer.
async fn file(path: PathBuf, kind: &'static str) -> Answer<Response> {
    let opened = tokio::fs::File::open(&path).await;
    streamed(opened.map_err(Error::io(&path))?, kind).await
}

/// An open file as an answer, which is read while it is sent.
async fn streamed(file: tokio::fs::File, kind: &'static str) -> Answer<Response> {
    let headers = [
        (header::CONTENT_TYPE, kind.to_owned()),
        (
            header::CONTENT_LENGTH,
            file.metadata().await?.len().to_string(),
        ),
    ];
    let body = Body::from_stream(ReaderStream::with_capacity(file, PIECE));
    Ok((headers, body).into_response())
}

/// The header that names a download.
fn attachment(name: &str) -> [(header::HeaderName, String); 1] {
    let disposition = format!("attachment; filename=\"{name}\"");
    [(header::CONTENT_DISPOSITION, disposition)]
}

/// The content type of a file name.
fn kind_of(path: &Path) -> &'static str {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("png") => "image/png",
        Some("jpg" | "jpeg") => "image/jpeg",
        Some("webp") => "image/webp",
        Some("gif") => "image/gif",
        Some("bmp") => "image/bmp",
        Some("tif" | "tiff") => "image/tiff",
        Some("json") => "application/json",
        _ => "application/octet-stream",
    }
}

/// A file of a job: one of its pictures or results.
pub(crate) fn job_file(store: &Store, id: &str, name: &str) -> Option<PathBuf> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if name.starts_with('.') || !name.chars().all(fits) {
        return None;
    }
    let folder = store.job_folder(id);
    let places = [RESULTS, INPUTS].map(|place| folder.join(place).join(name));
    places.into_iter().find(|path| path.is_file())
}

async fn get_capabilities(State(app): Shared) -> Answer<Response> {
    let all = blocking(move || capabilities::all(&app)).await?;
    Ok(ok(&all))
}

async fn get_models(State(app): Shared) -> Answer<Response> {
    let all = blocking(move || models::all(app.store.waiting_process())).await?;
    Ok(ok(&all))
}

async fn get_description() -> Response {
    ok(&openapi::description())
}

async fn get_example(Named(name): Named<String>) -> Answer<Response> {
    let path = capabilities::example(&name).ok_or_else(|| Problem::not_found("picture"))?;
    file(path, "image/png").await
}

/// Which jobs are listed.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Listing {
    /// The maximum number of jobs, besides the running one.
    limit: Option<usize>,
    /// The kinds of jobs, separated by commas.
    kinds: Option<String>,
}

async fn get_jobs(
    State(app): Shared,
    listing: Result<Query<Listing>, QueryRejection>,
) -> Answer<Response> {
    let Query(Listing { limit, kinds }) = listing.map_err(|error| Problem::query(&error))?;
    let kinds = kinds.map(|kinds| {
        let kinds = kinds.split(',').map(|name| {
            let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name);
            kind.ok_or_else(|| Problem::field("kinds", format!("kinds: there is no kind `{name}`")))
        });
        kinds.collect::<Answer<Vec<Kind>>>()
    });
    let kinds = kinds.transpose()?.unwrap_or_else(|| Kind::ALL.to_vec());
    let (jobs, count) = app.store.newest(limit.unwrap_or(usize::MAX), &kinds);
    Ok(ok(&object!({ "jobs": jobs, "count": count })))
}

async fn post_job(State(app): Shared, headers: HeaderMap, sent: Body) -> Answer<Response> {
    let key = match headers.get("idempotency-key") {
        Some(key) => match key.to_str() {
            Ok(key) if (1..=200).contains(&key.len()) => Some(key.to_owned()),
            _ => {
                return Err(Problem::field(
                    "Idempotency-Key",
                    "expected 1 to 200 ASCII characters",
                ));
            }
        },
        None => None,
    };
    let sent = body(&app, &headers, sent).await?;
    Ok(accepted(&queue(&app, sent, key).await?))
}

/// Queues the job of a request.
pub(super) async fn queue(app: &Arc<App>, sent: Vec<u8>, key: Option<String>) -> Answer<Value> {
    checked(app, move |app| {
        let origin = Origin {
            key,
            ..Origin::default()
        };
        request::accept(app, request::parse(&sent)?, origin)
    })
    .await
}

/// Checks a request in its turn, to the end even if its client disconnects.
pub(super) async fn checked<T: Send + 'static>(
    app: &Arc<App>,
    check: impl FnOnce(&Arc<App>) -> Answer<T> + Send + 'static,
) -> Answer<T> {
    let turn = Arc::clone(&app.checking).lock_owned().await;
    let app = Arc::clone(app);
    blocking(move || {
        let _turn = turn;
        check(&app)
    })
    .await
}

/// A place among the clients that wait for a job.
pub(super) fn follower(app: &App) -> Answer<OwnedSemaphorePermit> {
    Arc::clone(&app.followers).try_acquire_owned().map_err(|_| {
        let message = format!("{FOLLOWERS} clients follow jobs already");
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, message)
            .hint("poll the job itself instead: `GET /v1/jobs/ID`")
    })
}

async fn get_job(State(app): Shared, Named(id): Named<String>) -> Answer<Response> {
    Ok(ok(&app.store.view(&id)?))
}

async fn delete_job(State(app): Shared, Named(id): Named<String>) -> Answer<StatusCode> {
    blocking(move || app.store.remove(&id)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn cancel_job(State(app): Shared, Named(id): Named<String>) -> Answer<Response> {
    Ok(ok(&app.store.cancel(&id)?))
}

async fn put_first(State(app): Shared, Named(id): Named<String>) -> Answer<Response> {
    Ok(ok(&app.store.put_first(&id)?))
}

async fn retry_job(State(app): Shared, Named(id): Named<String>) -> Answer<Response> {
    let job = app.store.get(&id)?;
    if !job.stored.state.is_final() {
        return Err(Problem::conflict("the job is not over"));
    }
    let request = serde_json::from_value(job.stored.request)?;
    let again = move |app: &Arc<App>| {
        let origin = Origin {
            again: Some(&id),
            ..Origin::default()
        };
        request::accept(app, request, origin)
    };
    Ok(accepted(&checked(&app, again).await?))
}

async fn get_file(
    State(app): Shared,
    Named((id, name)): Named<(String, String)>,
) -> Answer<Response> {
    app.store.get(&id)?;
    let path = job_file(&app.store, &id, &name).ok_or_else(|| Problem::not_found("file"))?;
    let kind = kind_of(&path);
    let forever = "private, max-age=31536000, immutable"; // no other job gets its address
    let headers = [(header::CACHE_CONTROL, forever)];
    Ok((headers, file(path, kind).await?).into_response())
}

/// Answers with all result pictures of a job.
async fn get_zip(State(app): Shared, Named(id): Named<String>) -> Answer<Response> {
    let pack = move || {
        let job = app.store.get(&id)?;
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored); // PNGs are compressed
        let file = tempfile::tempfile()?; // gone when it is closed
        let mut archive = zip::ZipWriter::new(file);
        let pictures = job
            .stored
            .results
            .iter()
            .filter(|result| result["kind"] == "picture");
        let mut taken = BTreeSet::new();
        for result in pictures {
            let url = result["url"].as_str().unwrap_or_default();
            let file = url.rsplit('/').next().unwrap_or_default();
            let Some(path) = job_file(&app.store, &id, file) else {
                continue;
            };
            let name = name_in_archive(&job.stored.request, result, &mut taken);
            archive.start_file(name, options)?;
            let mut picture = File::open(&path).map_err(Error::io(&path))?;
            io::copy(&mut picture, &mut archive)?;
        }
        let mut file = archive.finish()?;
        file.rewind()?;
        Ok((id, file))
    };
    let (id, file) = blocking(pack).await?;
    let packed = streamed(tokio::fs::File::from_std(file), "application/zip").await?;
    Ok((attachment(&format!("dinv-{id}.zip")), packed).into_response())
}

/// The name of a result among all of a job: that of its B, with the strength if it is not 1.
fn name_in_archive(request: &Value, result: &Value, taken: &mut BTreeSet<String>) -> String {
    let target = result["target"].as_u64().unwrap_or(0);
    let target = usize::try_from(target).unwrap_or(0);
    let given = request["targets"][target]["name"].as_str().map(Path::new);
    let stem = given.and_then(Path::file_stem);
    let stem = stem.map(|stem| without_reserved(&stem.to_string_lossy()));
    let mut name = stem
        .filter(|stem| !stem.is_empty())
        .unwrap_or_else(|| format!("picture-{}", target + 1));
    if let Some(strength) = result["strength"]
        .as_f64()
        .filter(|strength| *strength != 1.0)
    {
        name = format!("{name}-{strength}");
    }
    unused(taken, |number| match number {
        1 => format!("{name}.png"),
        number => format!("{name} ({number}).png"),
    })
}

/// Answers with the events of a job, from the one after `Last-Event-ID`.
async fn get_events(
    State(app): Shared,
    Named(id): Named<String>,
    headers: HeaderMap,
) -> Answer<Response> {
    app.store.get(&id)?;
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok());
    let last = last.and_then(|id| id.parse().ok()).unwrap_or(0);
    let place = follower(&app)?;
    let events = Sse::new(events(app, id, last, place)).keep_alive(KeepAlive::default());
    let at_once = [("x-accel-buffering", "no")]; // for nginx
    Ok((at_once, events).into_response())
}

fn events(
    app: Arc<App>,
    id: String,
    last: u64,
    place: OwnedSemaphorePermit,
) -> impl Stream<Item = Result<Event, Infallible>> {
    struct Watch {
        app: Arc<App>,
        id: String,
        /// The number of the last event sent.
        last: u64,
        changes: tokio::sync::watch::Receiver<u64>,
        first: bool,
        is_over: bool,
        _place: OwnedSemaphorePermit,
    }
    let changes = app.store.changes();
    let watch = Watch {
        app,
        id,
        last,
        changes,
        first: true,
        is_over: false,
        _place: place,
    };
    let batches = stream::unfold(watch, |mut watch| async move {
        loop {
            if watch.is_over {
                return None;
            }
            watch.changes.borrow_and_update();
            let since = watch.app.store.since(&watch.id, watch.last)?;
            if watch.first || since.event != watch.last {
                let losses = since.losses.iter().map(|loss| {
                    let event = Event::default().event("loss").id(loss.event.to_string());
                    event.data(object!([loss.step, loss.loss]).to_string())
                });
                let preview = since.preview.iter().map(|(number, picture)| {
                    let event = Event::default().event("preview").id(number.to_string());
                    event.data(picture)
                });
                let mut events: Vec<_> = losses.chain(preview).map(Ok).collect();
                let job = Event::default().event("job").id(since.event.to_string());
                events.push(Ok(job.data(since.job.to_string())));
                (watch.first, watch.last, watch.is_over) = (false, since.event, since.is_final);
                return Some((stream::iter(events), watch));
            }
            watch.changes.changed().await.ok()?;
            tokio::time::sleep(BETWEEN_EVENTS).await;
        }
    });
    batches.flatten()
}

async fn get_differences(State(app): Shared) -> Answer<Response> {
    let all = blocking(move || differences::all(&app.store)).await?;
    Ok(ok(&object!({ "differences": all })))
}

async fn get_difference(State(app): Shared, Named(name): Named<String>) -> Answer<Response> {
    let path = differences::find(&app.store, &name)?;
    let response = file(path, "application/octet-stream").await?;
    Ok((attachment(&format!("{name}.safetensors")), response).into_response())
}

async fn put_difference(
    State(app): Shared,
    Named(name): Named<String>,
    headers: HeaderMap,
    sent: Body,
) -> Answer<Response> {
    let bytes = body(&app, &headers, sent).await?;
    let kept = blocking(move || differences::put(&app.store, &name, &bytes)).await?;
    Ok(json(StatusCode::CREATED, &kept))
}

/// The new name of a difference.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Renaming {
    name: String,
}

async fn patch_difference(
    State(app): Shared,
    Named(name): Named<String>,
    headers: HeaderMap,
    sent: Body,
) -> Answer<Response> {
    let sent = body(&app, &headers, sent).await?;
    let new: Renaming =
        serde_json::from_slice(&sent).map_err(|error| Problem::field("name", error.to_string()))?;
    let renamed = blocking(move || differences::rename(&app.store, &name, &new.name)).await?;
    Ok(ok(&renamed))
}

async fn delete_difference(State(app): Shared, Named(name): Named<String>) -> Answer<StatusCode> {
    blocking(move || differences::remove(&app.store, &name)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn get_thumbnail(State(app): Shared, Named(name): Named<String>) -> Answer<Response> {
    file(differences::thumbnail(&app.store, &name)?, "image/png").await
}

async fn get_exports(
    State(app): Shared,
    Named(name): Named<String>,
    wish: Result<Query<Wish>, QueryRejection>,
) -> Answer<Response> {
    let Query(wish) = wish.map_err(|error| Problem::query(&error))?;
    let all = blocking(move || differences::exports(&app.store, &name, &wish)).await?;
    Ok(ok(&object!({ "exports": all })))
}

async fn get_exported(
    State(app): Shared,
    Named((name, format, file)): Named<(String, String, String)>,
    wish: Result<Query<Wish>, QueryRejection>,
) -> Answer<Response> {
    let Query(wish) = wish.map_err(|error| Problem::query(&error))?;
    let disposition = attachment(&file);
    let read = move || differences::exported(&app.store, &name, &format, &file, &wish);
    let bytes = blocking(read).await?;
    Ok((disposition, bytes).into_response())
}

/// The picture whose text is requested.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pictured {
    picture: String,
}

/// Answers with the text stored in one of the program's pictures.
async fn read_png(State(app): Shared, headers: HeaderMap, sent: Body) -> Answer<Response> {
    let sent = body(&app, &headers, sent).await?;
    let read = move || {
        let asked: Pictured = serde_json::from_slice(&sent)
            .map_err(|error| Problem::field("picture", error.to_string()))?;
        let bytes = request::picture(&app.store, &asked.picture)
            .map_err(|message| Problem::field("picture", message))?;
        let hidden = HiddenFolder::new(&app.store.jobs_folder())?;
        let path = hidden.path().join("picture.png");
        fs::write(&path, bytes).map_err(Error::io(&path))?;
        let none = || {
            Problem::field(
                "picture",
                "not a picture made by `dinv`: it does not say how it was made",
            )
        };
        let text = read_png_text(&path).map_err(|_| none())?;
        let (_, recipe) = text
            .iter()
            .find(|(key, _)| key == "dinv")
            .ok_or_else(none)?;
        serde_json::from_str::<Value>(recipe).map_err(|_| none())
    };
    Ok(ok(&blocking(read).await?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_named_after_their_pictures() {
        let request = object!({ "targets": [
            { "name": "holiday/IMG_0042.jpg" }, { "name": "img_0042.png" }, { "name": "a?b.png" }, {},
        ] });
        let mut taken = BTreeSet::new();
        let results = [(0, 1.0), (0, 0.5), (1, 1.0), (2, 1.0), (3, 1.0), (3, 1.0)];
        let names = results.map(|(target, strength)| {
            let result = object!({ "target": target, "strength": strength });
            name_in_archive(&request, &result, &mut taken)
        });
        let expected = [
            "IMG_0042.png",
            "IMG_0042-0.5.png",
            "img_0042 (2).png",
            "a-b.png",
            "picture-4.png",
            "picture-4 (2).png",
        ];
        assert_eq!(names, expected);
    }
}
