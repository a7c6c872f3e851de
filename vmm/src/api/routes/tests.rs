//! Every endpoint, over a real socket, with a machine's thread that answers as the test wants.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use migration::MoveControl;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::api::ApiServer;
use crate::client::{Client, ClientError, Status};
use crate::job::{JobKind, Jobs};
use crate::machine::Event;
use crate::service::{VmInfo, VmState};

/// What the machine's thread does with a request.
type Behaviour = Box<dyn FnMut(Request, &Jobs) -> Reply + Send>;

/// The API of a fake machine, and what was asked of it.
struct Fixture {
    server: ApiServer,
    directory: TempDir,
    asked: Arc<Mutex<Vec<String>>>,
    jobs: Jobs,
}

/// An HTTP answer.
struct Answered {
    status: u16,
    head: String,
    body: Value,
}

impl Fixture {
    fn new(mut behaviour: Behaviour) -> Self {
        let (events, inbox) = mpsc::channel();
        let jobs = Jobs::default();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        let table = jobs.clone();
        std::thread::spawn(move || {
            while let Ok(event) = inbox.recv() {
                if let Event::Request(request, reply_to) = event {
                    log.lock().expect("log").push(format!("{request:?}"));
                    reply_to(behaviour(request, &table));
                }
            }
        });
        Self::over(Service::new(events, jobs.clone()), asked, jobs)
    }

    fn over(service: Service, asked: Arc<Mutex<Vec<String>>>, jobs: Jobs) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let server = ApiServer::start(&directory.path().join("api.sock"), service).expect("starts");
        Self {
            server,
            directory,
            asked,
            jobs,
        }
    }

    /// Everything succeeds without an answer.
    fn agreeable() -> Self {
        Self::new(Box::new(|_, _| Ok(Response::Done)))
    }

    /// Everything is refused like this.
    fn refusing(kind: ErrorKind) -> Self {
        Self::new(Box::new(move |_, _| {
            Err(ServiceError::new(kind, "no, because"))
        }))
    }

    /// Starts a job for every request; `end` says how it ends at once, if it does.
    fn working(end: Option<(JobStatus, Option<ServiceError>)>) -> Self {
        Self::new(Box::new(move |_, jobs| {
            let id = jobs.start(
                JobKind::Send,
                "tcp:there:1".into(),
                Arc::new(MoveControl::new()),
            );
            if let Some((status, error)) = end.clone() {
                jobs.finish(id, status, error);
            }
            Ok(Response::JobStarted(id))
        }))
    }

    fn client(&self) -> Client {
        Client::new(self.server.path()).expect("a client")
    }

    /// Sends a request, for a test that does not want the answer yet.
    fn begin(&self, method: &str, path: &str, body: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.server.path()).expect("connects");
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        // The answer to a body that is too long may come before all of it has been sent.
        let _ = stream.write_all(request.as_bytes());
        stream
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Answered {
        let mut text = String::new();
        self.begin(method, path, body)
            .read_to_string(&mut text)
            .expect("an answer");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        Answered {
            status: status.expect("a status"),
            head: head.to_ascii_lowercase(),
            body: match body {
                "" => Value::Null,
                json => serde_json::from_str(json).expect("JSON"),
            },
        }
    }

    /// Asks and checks the status, and that a refusal looks like one.
    fn expect(&self, status: u16, method: &str, name: &str, body: &str) -> Value {
        let answer = self.ask(method, &format!("{PREFIX}/{name}"), body);
        let value = answer.body;
        assert_eq!(answer.status, status, "{method} {name} {body}: {value}");
        if status >= 400 {
            assert!(
                answer.head.contains("content-type: application/json"),
                "{}",
                answer.head
            );
            assert!(value["kind"].is_string(), "{method} {name}: {value}");
            assert!(
                value["message"].as_str().is_some_and(|m| !m.is_empty()),
                "{method} {name}: {value}"
            );
            assert_eq!(value.as_object().map(serde_json::Map::len), Some(2));
        }
        value
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("log").clone()
    }
}

#[test]
fn actions_are_passed_on_and_answer_204() {
    let actions = [
        ("vmm.shutdown", "VmmShutdown"),
        ("vm.boot", "Boot"),
        ("vm.pause", "Pause"),
        ("vm.resume", "Resume"),
        ("vm.reboot", "Reboot"),
        ("vm.shutdown", "Shutdown"),
        ("vm.power-button", "PowerButton"),
        ("vm.delete", "Delete"),
        ("jobs/7/cancel", "CancelJob(7)"),
    ];
    let fixture = Fixture::agreeable();
    for (name, request) in actions {
        for body in ["", "{}"] {
            assert_eq!(fixture.expect(204, "PUT", name, body), Value::Null);
            assert_eq!(fixture.asked().last().map(String::as_str), Some(request));
        }
        let before = fixture.asked().len();
        let refusal = fixture.expect(400, "PUT", name, r#"{"force": true}"#);
        assert_eq!(refusal["kind"], "bad_request");
        assert_eq!(
            fixture.asked().len(),
            before,
            "{name}: refused before it was asked"
        );
    }
    assert_eq!(ACTIONS.len() + 1, actions.len());
}

#[test]
fn ping_answers_without_the_machine() {
    let fixture = Fixture::refusing(ErrorKind::Internal);
    let pong = fixture.expect(200, "GET", "vmm.ping", "");
    assert_eq!(pong["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(
        pong["build_version"],
        concat!("v", env!("CARGO_PKG_VERSION"))
    );
    assert_eq!(pong["pid"], std::process::id());
    assert!(pong["features"].is_array());
    assert!(fixture.asked().is_empty());
}

#[test]
fn create_takes_a_config() {
    let fixture = Fixture::agreeable();
    fixture.expect(
        204,
        "PUT",
        "vm.create",
        r#"{"payload": {"kernel": "vmlinux"}}"#,
    );
    assert!(fixture.asked()[0].starts_with("Create(VmConfig"));
    let wrong = [
        ("", "body is empty"),
        ("{", "line 1"),
        ("[]", "invalid config"),
        (r#"{"payload": {"kernel": 1}}"#, "payload.kernel"),
        (r#"{"payload": {"kernel": "k", "drive": "d"}}"#, "drive"),
        (r#"{"payload": {"kernel": "k"}, "colour": "red"}"#, "colour"),
        (
            r#"{"payload": {"kernel": "k"}, "memory": {"size": 0}}"#,
            "memory.size",
        ),
    ];
    for (body, part) in wrong {
        let refusal = fixture.expect(400, "PUT", "vm.create", body);
        assert_eq!(refusal["kind"], "bad_request");
        let message = refusal["message"].as_str().unwrap_or_default();
        assert!(message.contains(part), "{body}: {message}");
    }
    assert_eq!(fixture.asked().len(), 1);
}

#[test]
fn info_and_counters_are_json() {
    let fixture = Fixture::new(Box::new(|request, _| {
        Ok(match request {
            Request::Info => Response::Info(Box::new(VmInfo {
                config: VmConfig::from_json(br#"{"payload": {"kernel": "vmlinux"}}"#)
                    .expect("valid"),
                state: VmState::Running,
                memory_actual_size: 512 << 20,
                bootable: true,
                booted: None,
                hypervisor: None,
                vcpus: None,
            })),
            _ => Response::Counters(BTreeMap::from([(
                "serial".into(),
                BTreeMap::from([("bytes_out".into(), 7)]),
            )])),
        })
    }));
    let info = fixture.expect(200, "GET", "vm.info", "");
    assert_eq!(info["state"], "Running");
    assert_eq!(info["memory_actual_size"], 512 << 20);
    assert_eq!(info["config"]["payload"]["kernel"], "vmlinux");
    let counters = fixture.expect(200, "GET", "vm.counters", "");
    assert_eq!(counters, json!({"serial": {"bytes_out": 7}}));
    // An answer to another question is our own fault.
    let fault = fixture.expect(500, "PUT", "vm.boot", "");
    assert_eq!(fault["kind"], "internal");
}

/// A host that has these bits in leaf 1 ECX.
fn cpu_dump(ecx: &str) -> Value {
    json!({
        "format": "vmm-cpu-dump", "version": 1, "name": "made up",
        "cpuid": [
            {"leaf": "0x0", "eax": "0x1", "ebx": "0x756e6547", "ecx": "0x6c65746e", "edx": "0x49656e69"},
            {"leaf": "0x1", "eax": "0x306f2", "ebx": "0x0", "ecx": ecx, "edx": "0x7800001"},
        ],
    })
}

#[test]
fn hosts_are_compared_and_baselines_made() {
    let fixture = Fixture::new(Box::new(|_, _| {
        let dump = serde_json::from_value(cpu_dump("0x1")).expect("a dump");
        Ok(Response::CpuDump(Box::new(dump)))
    }));
    let host = fixture.expect(200, "GET", "cpu", "");
    assert_eq!(host["format"], "vmm-cpu-dump");
    // SSE3 against SSE3 and SSSE3.
    let pair = json!({"a": host, "b": cpu_dump("0x201")}).to_string();
    let comparison = fixture.expect(200, "POST", "cpu/compare", &pair);
    assert_eq!(comparison["relation"], "subset");
    assert_eq!(comparison["only_b"][0]["cpuid"]["names"], json!(["ssse3"]));
    let hosts = json!({"hosts": [cpu_dump("0x201"), cpu_dump("0x1")]}).to_string();
    let model = fixture.expect(200, "POST", "cpu/baseline", &hosts);
    assert_eq!(model["features"]["pni"], json!(true));
    assert_eq!(model["features"]["ssse3"], Value::Null);
    for (endpoint, body, part) in [
        ("cpu/compare", "{}", "missing field `a`"),
        ("cpu/baseline", r#"{"hosts": []}"#, "at least one host"),
        (
            "cpu/baseline",
            r#"{"hosts": [{"format": "vmm-cpu-dump", "version": 9, "name": "", "cpuid": []}]}"#,
            "version 9",
        ),
    ] {
        let refusal = fixture.expect(400, "POST", endpoint, body);
        assert!(
            refusal["message"]
                .as_str()
                .is_some_and(|m| m.contains(part)),
            "{refusal}"
        );
    }
}

#[test]
fn refusals_have_the_status_of_their_kind() {
    let kinds = [
        (ErrorKind::BadRequest, 400, "bad_request"),
        (ErrorKind::NotFound, 404, "not_found"),
        (ErrorKind::MethodNotAllowed, 405, "method_not_allowed"),
        (ErrorKind::WrongState, 409, "wrong_state"),
        (ErrorKind::Failed, 409, "failed"),
        (ErrorKind::Internal, 500, "internal"),
    ];
    for (kind, status, name) in kinds {
        let fixture = Fixture::refusing(kind);
        let requests = [
            ("PUT", "vm.boot", ""),
            ("GET", "vm.info", ""),
            ("GET", "vm.counters", ""),
            ("PUT", "vm.create", r#"{"payload": {"kernel": "k"}}"#),
            (
                "PUT",
                "vm.send-migration",
                r#"{"destination_url": "tcp:h:1"}"#,
            ),
            (
                "PUT",
                "vm.receive-migration",
                r#"{"receiver_url": "tcp:h:1"}"#,
            ),
            ("PUT", "vm.snapshot", r#"{"destination_url": "file:///s"}"#),
            ("PUT", "vm.restore", r#"{"source_url": "file:///s"}"#),
            ("PUT", "jobs/1/cancel", ""),
            ("PUT", "jobs/1/settle", r#"{"outcome": "runs_there"}"#),
        ];
        for (method, endpoint, body) in requests {
            let refusal = fixture.expect(status, method, endpoint, body);
            assert_eq!(refusal, json!({"kind": name, "message": "no, because"}));
        }
    }
}

#[test]
fn a_machine_that_is_gone_is_a_wrong_state() {
    let (events, inbox) = mpsc::channel();
    drop(inbox);
    let jobs = Jobs::default();
    let fixture = Fixture::over(Service::new(events, jobs.clone()), Arc::default(), jobs);
    let refusal = fixture.expect(409, "PUT", "vm.boot", "");
    assert!(
        refusal["message"]
            .as_str()
            .is_some_and(|m| m.contains("shutting down"))
    );
}

#[test]
fn unknown_paths_and_methods() {
    let fixture = Fixture::agreeable();
    for path in [
        "/",
        "/api/v1",
        "/api/v1/vm.fly",
        "/api/v2/vmm.ping",
        "/api/v1/jobs/1/pause",
        "/vm.info",
    ] {
        let answer = fixture.ask("GET", path, "");
        assert_eq!(
            (answer.status, &answer.body["kind"]),
            (404, &json!("not_found")),
            "{path}"
        );
    }
    let wrong = [
        ("PUT", "vmm.ping", "GET"),
        ("POST", "vm.create", "PUT"),
        ("GET", "vm.boot", "PUT"),
        ("DELETE", "vm.info", "GET"),
        ("POST", "jobs", "GET"),
        ("PUT", "jobs/1", "GET"),
        ("GET", "jobs/1/cancel", "PUT"),
        ("POST", "jobs/1/settle", "PUT"),
        ("GET", "vm.send-migration", "PUT"),
        ("GET", "vm.receive-migration", "PUT"),
        ("GET", "vm.snapshot", "PUT"),
        ("POST", "vm.restore", "PUT"),
    ];
    for (method, name, allowed) in wrong {
        let answer = fixture.ask(method, &format!("{PREFIX}/{name}"), "");
        assert_eq!(answer.status, 405, "{method} {name}");
        assert_eq!(answer.body["kind"], "method_not_allowed");
        let allow = answer.head.lines().find(|line| line.starts_with("allow:"));
        let allowed = allowed.to_ascii_lowercase();
        assert!(
            allow.is_some_and(|line| line.contains(&allowed)),
            "{method} {name}: {}",
            answer.head
        );
    }
    assert!(fixture.asked().is_empty());
}

#[test]
fn bodies_are_limited() {
    let fixture = Fixture::agreeable();
    let padding = " ".repeat(MAX_BODY);
    let long = format!(r#"{{"payload": {{"kernel": "k"}}}}{padding}"#);
    for name in ["vm.create", "vm.boot", "vm.send-migration"] {
        let refusal = fixture.expect(413, "PUT", name, &long);
        assert_eq!(refusal["kind"], "bad_request");
    }
    let longest = format!(
        r#"{{"payload": {{"kernel": "k"}}}}{}"#,
        " ".repeat(MAX_BODY - 28)
    );
    assert_eq!(longest.len(), MAX_BODY);
    fixture.expect(204, "PUT", "vm.create", &longest);
}

#[test]
fn a_move_answers_at_its_end() {
    let send = r#"{"destination_url": "tcp:h:1", "downtime_ms": 5, "timeout_s": 9, "timeout_strategy": "ignore"}"#;
    let receive = r#"{"receiver_url": "unix:/tmp/x"}"#;
    let failed = |kind| Some(ServiceError::new(kind, "the peer vanished"));
    let ends = [
        (JobStatus::Succeeded, None, 204, Value::Null),
        (
            JobStatus::Failed,
            failed(ErrorKind::Failed),
            409,
            json!({"kind": "failed", "message": "the peer vanished"}),
        ),
        (
            JobStatus::Failed,
            None,
            409,
            json!({"kind": "failed", "message": "the job failed"}),
        ),
        (
            JobStatus::Cancelled,
            None,
            409,
            json!({"kind": "failed", "message": "the job was cancelled"}),
        ),
        (
            JobStatus::InDoubt,
            failed(ErrorKind::Failed),
            409,
            json!({"kind": "failed", "message": "the peer vanished"}),
        ),
    ];
    for (status, error, http, body) in ends {
        let fixture = Fixture::working(Some((status, error)));
        assert_eq!(fixture.expect(http, "PUT", "vm.send-migration", send), body);
        assert_eq!(
            fixture.expect(http, "PUT", "vm.receive-migration?wait=true", receive),
            body
        );
        assert!(fixture.asked()[0].contains("downtime_ms: 5"));
    }
}

#[test]
fn a_move_without_waiting_answers_with_its_job() {
    let fixture = Fixture::working(None);
    let send = r#"{"destination_url": "tcp:h:1"}"#;
    let answer = fixture.expect(202, "PUT", "vm.send-migration?wait=false", send);
    assert_eq!(answer, json!({"job": 1}));
    let receive = r#"{"receiver_url": "tcp:h:0", "serial": {"mode": "Null"}}"#;
    let answer = fixture.expect(202, "PUT", "vm.receive-migration?wait=false", receive);
    assert_eq!(answer, json!({"job": 2}));
    let refusal = fixture.expect(400, "PUT", "vm.send-migration?wait=maybe", send);
    assert!(
        refusal["message"]
            .as_str()
            .is_some_and(|m| m.contains("wait=maybe"))
    );
}

#[test]
fn bodies_of_moves_are_checked() {
    let fixture = Fixture::working(None);
    let wrong = [
        ("vm.send-migration", "", "empty"),
        ("vm.send-migration", "{}", "destination_url"),
        ("vm.send-migration", r#"{"destination_url": 1}"#, "string"),
        (
            "vm.send-migration",
            r#"{"destination_url": "tcp:h:1", "local": true}"#,
            "local",
        ),
        (
            "vm.send-migration",
            r#"{"destination_url": "tcp:h:1", "timeout_strategy": "pray"}"#,
            "pray",
        ),
        ("vm.receive-migration", "{}", "receiver_url"),
        (
            "vm.receive-migration",
            r#"{"receiver_url": "u", "serial": {"mode": "Fax"}}"#,
            "Fax",
        ),
        ("vm.snapshot", "{}", "destination_url"),
        ("vm.restore", r#"{"prefault": true}"#, "source_url"),
        (
            "vm.restore",
            r#"{"source_url": "file:///s", "eager": true}"#,
            "eager",
        ),
        ("jobs/1/settle", "{}", "outcome"),
        ("jobs/1/settle", r#"{"outcome": "maybe"}"#, "resume_here"),
        (
            "jobs/1/settle",
            r#"{"outcome": "runs_there", "sure": true}"#,
            "sure",
        ),
    ];
    for (name, body, part) in wrong {
        let refusal = fixture.expect(400, "PUT", name, body);
        let message = refusal["message"].as_str().unwrap_or_default();
        assert!(message.contains(part), "{name} {body}: {message}");
    }
    assert!(fixture.asked().is_empty());
}

#[test]
fn jobs_are_listed_and_looked_up_without_the_machine() {
    let fixture = Fixture::refusing(ErrorKind::Internal);
    assert_eq!(fixture.expect(200, "GET", "jobs", ""), json!([]));
    let id = fixture.jobs.start(
        JobKind::Send,
        "tcp:h:1".into(),
        Arc::new(MoveControl::new()),
    );
    let list = fixture.expect(200, "GET", "jobs", "");
    assert_eq!(list[0]["id"], id);
    let job = fixture.expect(200, "GET", &format!("jobs/{id}"), "");
    assert_eq!(
        (&job["status"], &job["kind"], &job["url"]),
        (&json!("running"), &json!("send"), &json!("tcp:h:1"))
    );
    for figure in [
        "phase",
        "rounds",
        "bytes_total",
        "bytes_sent",
        "bytes_remaining",
        "elapsed_ms",
    ] {
        assert!(!job[figure].is_null(), "{figure}: {job}");
    }
    assert_eq!(
        fixture.expect(404, "GET", "jobs/99", "")["kind"],
        "not_found"
    );
    assert_eq!(
        fixture.expect(404, "GET", "jobs/99?wait=true", "")["kind"],
        "not_found"
    );
    for wrong in [
        "jobs/first",
        "jobs/-1",
        "jobs/1.5",
        "jobs/99999999999999999999999",
        "jobs/%ff",
    ] {
        assert_eq!(
            fixture.expect(400, "GET", wrong, "")["kind"],
            "bad_request",
            "{wrong}"
        );
    }
    assert!(fixture.asked().is_empty());
}

#[test]
fn the_end_of_a_job_can_be_waited_for() {
    let fixture = Fixture::agreeable();
    let id = fixture.jobs.start(
        JobKind::Send,
        "tcp:h:1".into(),
        Arc::new(MoveControl::new()),
    );
    let jobs = fixture.jobs.clone();
    let end = std::thread::spawn(move || jobs.finish(id, JobStatus::Succeeded, None));
    let job = fixture.expect(200, "GET", &format!("jobs/{id}?wait=true"), "");
    assert_eq!(job["status"], "succeeded");
    end.join().expect("ends");
}

#[test]
fn settling_passes_the_outcome_on() {
    let fixture = Fixture::agreeable();
    fixture.expect(204, "PUT", "jobs/3/settle", r#"{"outcome": "resume_here"}"#);
    fixture.expect(204, "PUT", "jobs/3/settle", r#"{"outcome": "runs_there"}"#);
    assert_eq!(
        fixture.asked(),
        ["SettleJob(3, ResumeHere)", "SettleJob(3, RunsThere)"]
    );
}

#[test]
fn a_client_that_leaves_cancels_nothing() {
    let fixture = Fixture::working(None);
    let client = fixture.begin(
        "PUT",
        &format!("{PREFIX}/vm.send-migration"),
        r#"{"destination_url": "tcp:h:1"}"#,
    );
    while fixture.jobs.get(1).is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(client);
    // The API has seen the client go by the time that it answers another.
    fixture.expect(200, "GET", "vmm.ping", "");
    assert_eq!(
        fixture.jobs.get(1).map(|job| job.status),
        Some(JobStatus::Running)
    );
    assert_eq!(
        fixture.asked().len(),
        1,
        "nothing but the move was asked for"
    );
}

#[test]
fn answers_that_are_on_their_way_arrive_when_the_process_ends() {
    let fixture = Fixture::working(None);
    let mut client = fixture.begin(
        "PUT",
        &format!("{PREFIX}/vm.send-migration"),
        r#"{"destination_url": "tcp:h:1"}"#,
    );
    while fixture.jobs.get(1).is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let path = fixture.server.path().to_owned();
    fixture.jobs.finish(1, JobStatus::Succeeded, None);
    drop(fixture.server);
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    assert!(!path.exists(), "the socket is removed");
}

#[test]
fn client_reads_jobs_and_refusals() {
    let fixture = Fixture::working(Some((JobStatus::Succeeded, None)));
    let client = fixture.client();
    let body = br#"{"destination_url": "tcp:h:1"}"#.to_vec();
    let id = client.start_job("vm.send-migration", body).expect("starts");
    let job = client.job(id).expect("a job");
    assert_eq!(
        (job.id, job.status, job.url.as_str()),
        (id, Status::Succeeded, "tcp:there:1")
    );
    assert_eq!(job.raw["kind"], "send");
    assert_eq!(job.phase, job.raw["phase"]);
    assert_eq!(client.job_end(id).expect("a job").status, Status::Succeeded);
    let Err(ClientError::Refusal { status: 404, error }) = client.job(99) else {
        panic!("there is no such job");
    };
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert_eq!(
        ClientError::Refusal { status: 404, error }.to_json()["kind"],
        "not_found"
    );
}

#[test]
fn client_says_what_is_wrong_with_a_socket() {
    let fixture = Fixture::agreeable();
    let missing = Client::new(fixture.directory.path().join("none.sock")).expect("a client");
    let error = missing.get("vmm.ping").expect_err("no socket");
    assert!(matches!(error, ClientError::Missing(_)));
    assert!(error.to_string().contains("--api-socket"), "{error}");

    let stale = fixture.directory.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).expect("binds"));
    let error = Client::new(stale)
        .expect("a client")
        .get("vmm.ping")
        .expect_err("stale");
    assert!(matches!(error, ClientError::Refused(_)), "{error}");

    let mute = fixture.directory.path().join("mute.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&mute).expect("binds");
    let client = Client::new(mute)
        .expect("a client")
        .with_limit(Duration::from_millis(20));
    let error = client.get("vmm.ping").expect_err("nobody answers");
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
}
