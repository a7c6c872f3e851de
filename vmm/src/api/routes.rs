//! The endpoints.

use arch::x86_64::bounded;
use arch::x86_64::cpu_model::{CpuDump, CpuModel, baseline, compare};
use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{
    DefaultBodyLimit, FromRequest, FromRequestParts, Path, Request as HttpRequest, State,
};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response as HttpResponse};
use axum::routing::{get, post, put};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

use super::problem::{Problem, json};
use super::{MAX_BODY, PREFIX};
use crate::config::VmConfig;
use crate::job::{JobId, JobInfo, JobStatus};
use crate::service::{
    ErrorKind, ReceiveMigration, Reply, Request, Response, RestoreRequest, SendMigration, Service,
    ServiceError, Settlement, SnapshotRequest,
};

type Answer = Result<HttpResponse, Problem>;

type MakeRequest = fn() -> Request;

/// `PUT` endpoints without a body whose answer is 204.
const ACTIONS: &[(&str, MakeRequest)] = &[
    ("vmm.shutdown", || Request::VmmShutdown),
    ("vm.boot", || Request::Boot),
    ("vm.pause", || Request::Pause),
    ("vm.resume", || Request::Resume),
    ("vm.reboot", || Request::Reboot),
    ("vm.shutdown", || Request::Shutdown),
    ("vm.power-button", || Request::PowerButton),
    ("vm.delete", || Request::Delete),
];

/// All endpoints, served by `service`.
pub fn router(service: Service) -> Router {
    let mut router = Router::new();
    for &(name, request) in ACTIONS {
        let action = move |State(service): State<Service>, _: NoBody| async move {
            done(ask(&service, request()).await)
        };
        router = router.route(&path(name), put(action));
    }
    router
        .route(&path("vmm.ping"), get(ping))
        .route(&path("vm.create"), put(create))
        .route(&path("vm.info"), get(info))
        .route(&path("vm.counters"), get(counters))
        .route(&path("vm.add-disk"), put(add_disk))
        .route(&path("vm.add-net"), put(add_net))
        .route(&path("vm.add-fs"), put(add_fs))
        .route(&path("vm.add-vsock"), put(add_vsock))
        .route(&path("vm.remove-device"), put(remove_device))
        .route(&path("vm.payload"), put(payload))
        .route(&path("vm.resize"), put(resize))
        .route(&path("vm.resize-disk"), put(resize_disk))
        .route(&path("vm.send-migration"), put(send_migration))
        .route(&path("vm.receive-migration"), put(receive_migration))
        .route(&path("vm.snapshot"), put(snapshot))
        .route(&path("vm.restore"), put(restore))
        .route(&path("cpu"), get(cpu))
        .route(&path("cpu/compare"), post(cpu_compare))
        .route(&path("cpu/baseline"), post(cpu_baseline))
        .route(&path("jobs"), get(jobs))
        .route(&path("jobs/{id}"), get(job))
        .route(&path("jobs/{id}/cancel"), put(cancel_job))
        .route(&path("jobs/{id}/settle"), put(settle_job))
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(unknown_path)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(service)
}

fn path(name: &str) -> String {
    format!("{PREFIX}/{name}")
}

async fn ping() -> HttpResponse {
    json(
        StatusCode::OK,
        &serde_json::json!({
            "build_version": concat!("v", env!("CARGO_PKG_VERSION")),
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "features": ["kvm"],
        }),
    )
}

async fn create(State(service): State<Service>, Body(body): Body) -> Answer {
    let config =
        VmConfig::from_json(not_empty(&body)?).map_err(|e| Problem::bad_request(e.to_string()))?;
    done(ask(&service, Request::Create(Box::new(config))).await)
}

async fn info(State(service): State<Service>) -> Answer {
    match ask(&service, Request::Info).await? {
        Response::Info(info) => Ok(json(StatusCode::OK, &info)),
        other => Err(unexpected(&other)),
    }
}

async fn counters(State(service): State<Service>) -> Answer {
    match ask(&service, Request::Counters).await? {
        Response::Counters(counters) => Ok(json(StatusCode::OK, &counters)),
        other => Err(unexpected(&other)),
    }
}

async fn add_disk(State(service): State<Service>, Body(body): Body) -> Answer {
    added(&ask(&service, Request::AddDisk(device("disks", &body)?)).await?)
}

async fn add_net(State(service): State<Service>, Body(body): Body) -> Answer {
    added(&ask(&service, Request::AddNet(device("net", &body)?)).await?)
}

async fn add_vsock(State(service): State<Service>, Body(body): Body) -> Answer {
    added(&ask(&service, Request::AddVsock(device("vsock", &body)?)).await?)
}

/// A device as it would be in this section of a config.
fn device<T: DeserializeOwned>(section: &'static str, body: &[u8]) -> Result<Box<T>, Problem> {
    VmConfig::device(section, not_empty(body)?)
        .map(Box::new)
        .map_err(|error| Problem::bad_request(error.to_string()))
}

async fn add_fs(State(service): State<Service>, Body(body): Body) -> Answer {
    added(&ask(&service, Request::AddFs(device("fs", &body)?)).await?)
}

fn added(response: &Response) -> Answer {
    match response {
        Response::Device(device) => Ok(json(StatusCode::OK, device)),
        other => Err(unexpected(other)),
    }
}

async fn remove_device(State(service): State<Service>, Body(body): Body) -> Answer {
    done(ask(&service, Request::RemoveDevice(parse(&body)?)).await)
}

async fn payload(State(service): State<Service>, Body(body): Body) -> Answer {
    done(ask(&service, Request::Payload(Box::new(parse(&body)?))).await)
}

async fn resize(State(service): State<Service>, Body(body): Body) -> Answer {
    done(ask(&service, Request::Resize(parse(&body)?)).await)
}

async fn resize_disk(State(service): State<Service>, Body(body): Body) -> Answer {
    done(ask(&service, Request::ResizeDisk(parse(&body)?)).await)
}

/// This host, as [`cpu_compare`] and [`cpu_baseline`] take it.
async fn cpu(State(service): State<Service>) -> Answer {
    match ask(&service, Request::CpuDump).await? {
        Response::CpuDump(dump) => Ok(json(StatusCode::OK, &dump)),
        other => Err(unexpected(&other)),
    }
}

/// The body of `cpu/compare`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Compare {
    a: CpuDump,
    b: CpuDump,
}

async fn cpu_compare(Body(body): Body) -> Answer {
    let Compare { a, b } = parse(&body)?;
    Ok(json(StatusCode::OK, &compare(&a, &b)))
}

/// The body of `cpu/baseline`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Baseline {
    #[serde(default = "baseline_name")]
    name: String,
    #[serde(deserialize_with = "bounded::list::<_, _, 256>")]
    hosts: Vec<CpuDump>,
    #[serde(default)]
    cross_vendor: bool,
}

fn baseline_name() -> String {
    "baseline".to_owned()
}

/// Answers with a model that a config can name once it is in a file.
async fn cpu_baseline(Body(body): Body) -> Answer {
    let request: Baseline = parse(&body)?;
    let spec = baseline(&request.name, &request.hosts, request.cross_vendor)
        .map_err(|error| Problem::bad_request(error.to_string()))?;
    CpuModel::from_spec(&spec).map_err(|errors| Problem::bad_request(crate::cpu::list(&errors)))?;
    Ok(json(StatusCode::OK, &spec))
}

async fn send_migration(State(service): State<Service>, wait: Wait, Body(body): Body) -> Answer {
    let send: SendMigration = parse(&body)?;
    start_job(&service, Request::Send(send), wait.or(true)).await
}

async fn receive_migration(State(service): State<Service>, wait: Wait, Body(body): Body) -> Answer {
    let receive: ReceiveMigration = parse(&body)?;
    start_job(&service, Request::Receive(Box::new(receive)), wait.or(true)).await
}

async fn snapshot(State(service): State<Service>, wait: Wait, Body(body): Body) -> Answer {
    let snapshot: SnapshotRequest = parse(&body)?;
    start_job(&service, Request::Snapshot(snapshot), wait.or(true)).await
}

async fn restore(State(service): State<Service>, wait: Wait, Body(body): Body) -> Answer {
    let restore: RestoreRequest = parse(&body)?;
    start_job(&service, Request::Restore(Box::new(restore)), wait.or(true)).await
}

async fn jobs(State(service): State<Service>) -> HttpResponse {
    json(StatusCode::OK, &service.jobs().list())
}

/// A job as it is now, or with `?wait=true` as it ended.
async fn job(State(service): State<Service>, Id(id): Id, wait: Wait) -> Answer {
    let Some(job) = service.jobs().get(id) else {
        return Err(Problem::not_found(format!(
            "there is no job {id}; `GET {PREFIX}/jobs` lists them"
        )));
    };
    let job = if wait.or(false) {
        ended(&service, id).await?
    } else {
        job
    };
    Ok(json(StatusCode::OK, &job))
}

async fn cancel_job(State(service): State<Service>, Id(id): Id, _: NoBody) -> Answer {
    done(ask(&service, Request::CancelJob(id)).await)
}

/// The body of `jobs/{id}/settle`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Settle {
    outcome: Settlement,
}

async fn settle_job(State(service): State<Service>, Id(id): Id, Body(body): Body) -> Answer {
    let settle: Settle = parse(&body)?;
    done(ask(&service, Request::SettleJob(id, settle.outcome)).await)
}

async fn unknown_path(uri: Uri) -> Problem {
    Problem::not_found(format!(
        "there is no `{}`; all endpoints are under {PREFIX}/",
        uri.path()
    ))
}

async fn method_not_allowed(method: Method, uri: Uri) -> Problem {
    // The router adds the Allow header.
    ServiceError::new(
        ErrorKind::MethodNotAllowed,
        format!(
            "`{}` cannot be used with {method}; see the Allow header",
            uri.path()
        ),
    )
    .into()
}

/// Asks the machine's thread without blocking this one. If the client goes away in between, the
/// request has been handed over all the same.
async fn ask(service: &Service, request: Request) -> Reply {
    let (sender, receiver) = oneshot::channel();
    service.submit(
        request,
        Box::new(move |reply| {
            // The client may have gone; then nobody wants the answer.
            let _ = sender.send(reply);
        }),
    );
    receiver.await.unwrap_or_else(|_| Err(shutting_down()))
}

fn shutting_down() -> ServiceError {
    ServiceError::wrong_state("the vmm process is shutting down")
}

fn done(reply: Reply) -> Answer {
    match reply? {
        Response::Done => Ok(StatusCode::NO_CONTENT.into_response()),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(response: &Response) -> Problem {
    Problem::internal(format!(
        "the machine's thread gave an answer to another question: {response:?}"
    ))
}

/// Starts a job, and waits for its end if the client wants that.
async fn start_job(service: &Service, request: Request, wait: bool) -> Answer {
    let id = match ask(service, request).await? {
        Response::JobStarted(id) => id,
        other => return Err(unexpected(&other)),
    };
    if !wait {
        return Ok(json(
            StatusCode::ACCEPTED,
            &serde_json::json!({ "job": id }),
        ));
    }
    outcome(ended(service, id).await?)
}

/// Waits for the end of a job.
async fn ended(service: &Service, id: JobId) -> Result<JobInfo, Problem> {
    let (sender, receiver) = oneshot::channel();
    service.jobs().on_end(id, move |job| {
        // As above.
        let _ = sender.send(job);
    });
    receiver.await.map_err(|_| shutting_down().into())
}

/// The answer of a job that was waited for.
fn outcome(job: JobInfo) -> Answer {
    let default = match job.status {
        JobStatus::Succeeded => return Ok(StatusCode::NO_CONTENT.into_response()),
        JobStatus::Failed => "the job failed",
        JobStatus::Cancelled => "the job was cancelled",
        JobStatus::InDoubt => {
            "it is unknown whether the guest runs at the destination: settle the job"
        }
        JobStatus::Running => {
            return Err(Problem::internal(format!(
                "job {} ended but is running",
                job.id
            )));
        }
    };
    Err(job
        .error
        .unwrap_or_else(|| ServiceError::new(ErrorKind::Failed, default))
        .into())
}

/// A request body, at most [`MAX_BODY`] long.
struct Body(Bytes);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Problem;

    async fn from_request(request: HttpRequest, state: &S) -> Result<Self, Problem> {
        let body: Result<Bytes, BytesRejection> = Bytes::from_request(request, state).await;
        body.map(Self).map_err(|rejection| {
            let status = rejection.status();
            let message = if status == StatusCode::PAYLOAD_TOO_LARGE {
                format!("the body is longer than {MAX_BODY} bytes")
            } else {
                rejection.body_text()
            };
            Problem::with_status(status, ErrorKind::BadRequest, message)
        })
    }
}

/// A request that may have no body, or an empty object.
struct NoBody;

impl<S: Send + Sync> FromRequest<S> for NoBody {
    type Rejection = Problem;

    async fn from_request(request: HttpRequest, state: &S) -> Result<Self, Problem> {
        let Body(body) = Body::from_request(request, state).await?;
        match body.trim_ascii() {
            b"" | b"{}" | b"null" => Ok(Self),
            _ => Err(Problem::bad_request("this endpoint takes no body")),
        }
    }
}

/// The `{id}` of a job.
struct Id(JobId);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let id: Result<Path<String>, PathRejection> = Path::from_request_parts(parts, state).await;
        let Path(id) = id.map_err(|rejection| Problem::bad_request(rejection.body_text()))?;
        id.parse()
            .map(Self)
            .map_err(|_| Problem::bad_request(format!("`{id}` is not the number of a job")))
    }
}

/// The `?wait=` of a job: whether the answer comes when it is over or at once.
struct Wait(Option<bool>);

impl Wait {
    fn or(&self, default: bool) -> bool {
        self.0.unwrap_or(default)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Wait {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        match parts.uri.query() {
            None | Some("") => Ok(Self(None)),
            Some("wait=true") => Ok(Self(Some(true))),
            Some("wait=false") => Ok(Self(Some(false))),
            Some(other) => Err(Problem::bad_request(format!(
                "unknown query `{other}`: only wait=true and wait=false are known"
            ))),
        }
    }
}

fn not_empty(body: &[u8]) -> Result<&[u8], Problem> {
    if body.trim_ascii().is_empty() {
        return Err(Problem::bad_request(
            "the body is empty; it must be a JSON object",
        ));
    }
    Ok(body)
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    crate::json::parse(not_empty(body)?)
        .map_err(|e| Problem::bad_request(format!("invalid body: {e}")))
}

#[cfg(test)]
mod tests;
