//! Carries out what the [engine](super::engine) says: one function an action.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memory::GuestRam;
use zerocopy::FromBytes;

use super::engine::{Action, End, Engine, Event, Failure};
use super::pages::{self, Arrived, PageReceiver};
use crate::channel::{Channel, Limit, Patience, Stop};
use crate::control::{Wake, milliseconds};
use crate::lobby;
use crate::protocol::batch::{ATTACH_MAGIC, Attach};
use crate::protocol::hello::{HelloBody, HelloHeader};
use crate::protocol::message::{Abort, Accept, Message, Refuse, RoundDone, State};
use crate::protocol::{ProtocolError, VERSIONS};
use crate::{
    Cause, DestinationMachine, Listener, MachineState, MoveControl, Phase, ReceiveError,
    ReceiveOptions, ReceiveReport, RoundProgress,
};

/// Data channels that are served.
const DATA_CHANNELS: u16 = 1;
/// How long a broken connection is searched for the other side's reason.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Waits for a source and takes its machine in.
///
/// On success the machine is here, running or paused as it was. On failure nothing of it is left, and the source's guest
/// is not run here. `control` shows the progress, and cancels.
pub fn receive(
    listener: &Listener,
    machine: &mut dyn DestinationMachine,
    options: &ReceiveOptions,
    control: &MoveControl,
) -> Result<ReceiveReport, ReceiveError> {
    let wake = control.begin().map_err(|error| ReceiveError {
        phase: Phase::Connect,
        cause: Cause::Host {
            doing: "making an event descriptor",
            error,
        },
    })?;
    let mut driver = Driver {
        listener,
        machine,
        options,
        control,
        wake,
        began: Instant::now(),
        messages: None,
        hello: None,
        session: [0; 16],
        data: None,
        ram: None,
        state: None,
        rounds: 0,
        bytes_received: 0,
        cause: None,
    };
    let mut engine = Engine::new();
    let end = loop {
        control.update(|progress| progress.phase = engine.phase());
        let action = engine.action();
        if let Action::Finish(end) = action {
            break end;
        }
        tracing::debug!(?action, "destination");
        engine.handle(driver.perform(action));
    };
    control.end();
    match end {
        End::Arrived { source_informed } => Ok(ReceiveReport {
            rounds: driver.rounds,
            total_ms: milliseconds(driver.began),
            bytes_received: driver.bytes_received,
            source_informed,
        }),
        End::Failed { phase } => Err(ReceiveError {
            phase,
            cause: driver.cause.unwrap_or(Cause::Cancelled),
        }),
    }
}

/// An action that failed.
#[derive(Debug)]
struct Trouble {
    cause: Cause,
    failure: Failure,
}

impl Trouble {
    fn local(cause: impl Into<Cause>) -> Self {
        Self {
            cause: cause.into(),
            failure: Failure::Local,
        }
    }

    fn from_stop(stop: Stop, doing: &'static str) -> Self {
        let failure = match stop {
            Stop::Lost(_) | Stop::Alarm => Failure::PeerGone,
            Stop::Cancelled | Stop::Timeout(_) | Stop::Protocol(_) => Failure::Local,
        };
        Self {
            cause: stop.into_cause(doing),
            failure,
        }
    }
}

struct Driver<'a> {
    listener: &'a Listener,
    machine: &'a mut dyn DestinationMachine,
    options: &'a ReceiveOptions,
    control: &'a MoveControl,
    wake: Wake,
    began: Instant,
    /// The control channel.
    messages: Option<Channel>,
    hello: Option<HelloHeader>,
    session: [u8; 16],
    data: Option<Channel>,
    ram: Option<Arc<GuestRam>>,
    state: Option<MachineState>,
    rounds: u32,
    bytes_received: u64,
    /// Why the move fails: the first reason.
    cause: Option<Cause>,
}

impl Driver<'_> {
    fn perform(&mut self, action: Action) -> Event {
        let result = match action {
            Action::Listen => self.listen(),
            Action::Negotiate => self.negotiate(),
            Action::Reserve => self.reserve(),
            Action::Attach => self.attach(),
            Action::ReceiveMemory => self.receive_memory(),
            Action::Restore => self.restore(),
            Action::SayReady => self.say(&Message::Ready, "saying that the machine is ready"),
            Action::AwaitCommit => self.await_commit(),
            Action::Resume => self.resume(),
            Action::SayResumed => self.say(&Message::Resumed, "saying that the guest runs"),
            Action::Discard => self.discard(),
            Action::TellPeer => self.tell_peer(),
            Action::Finish(_) => Ok(()),
        };
        match result {
            Ok(()) => Event::Done,
            Err(Trouble { cause, failure }) => {
                tracing::debug!(%cause, ?failure, ?action, "destination");
                self.cause.get_or_insert(cause);
                Event::Failed(failure)
            }
        }
    }

    fn patience(&self, limit: Limit, doing: &'static str) -> Patience<'_> {
        Patience {
            wake: Some(&self.wake),
            alarm: None,
            limit,
            doing,
        }
    }

    fn messages(&self) -> Result<&Channel, Trouble> {
        self.messages.as_ref().ok_or_else(|| {
            Trouble::from_stop(
                Stop::Lost(std::io::ErrorKind::NotConnected.into()),
                "moving",
            )
        })
    }

    // --- one function an action ---

    fn listen(&mut self) -> Result<(), Trouble> {
        let limit = self.options.wait.map_or(Limit::Forever, Limit::within);
        let patience = self.patience(limit, "waiting for a source");
        let known = |bytes: &[u8]| match HelloHeader::read_from_bytes(bytes) {
            Ok(header) => header.check().map(drop).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let (channel, bytes) = lobby::wait_for(
            self.listener,
            HelloHeader::SIZE,
            self.options.connect_timeout,
            &patience,
            &known,
        )
        .map_err(|stop| Trouble::from_stop(stop, patience.doing))?;
        tracing::info!(peer = channel.peer(), "a source has come");
        self.hello = HelloHeader::read_from_bytes(&bytes).ok();
        self.messages = Some(channel);
        self.began = Instant::now();
        self.control.restart_clock();
        Ok(())
    }

    fn negotiate(&mut self) -> Result<(), Trouble> {
        const DOING: &str = "negotiating";
        let patience = self.patience(Limit::within(self.options.connect_timeout), DOING);
        let channel = self.messages()?;
        let body = HelloBody {
            features: Vec::new(),
            vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let exchange = || {
            // Said first, so that a source of another version can name both.
            channel.send_hello(&body, &patience)?;
            let header = self
                .hello
                .ok_or_else(|| Stop::Lost(std::io::ErrorKind::NotConnected.into()))?;
            let theirs = channel.receive_hello_body(&header, &patience)?;
            Ok((VERSIONS.newest_common(header.check()?)?, theirs))
        };
        let (version, theirs) = exchange().map_err(|stop: Stop| Trouble::from_stop(stop, DOING))?;
        tracing::info!(version, peer = theirs.vmm_version, "negotiated");
        Ok(())
    }

    fn reserve(&mut self) -> Result<(), Trouble> {
        let limit = Limit::within(self.options.connect_timeout);
        let manifest = match self.expect(&self.patience(limit, "waiting for the manifest"))? {
            Message::Manifest(manifest) => manifest,
            other => return Err(unexpected(&other, "manifest")),
        };
        let ram = self
            .machine
            .reserve(&manifest)
            .map_err(|reasons| Trouble::local(Cause::Refused(reasons)))?;
        let regions = ram.regions().iter().map(|region| region.range());
        if !regions.eq(manifest.memory.iter().copied()) {
            return Err(Trouble::local(ProtocolError::MemoryMismatch));
        }
        pages::clear(&ram).map_err(Trouble::local)?;
        let total = ram.total_bytes();
        self.control.update(|progress| progress.bytes_total = total);
        self.ram = Some(ram);
        getrandom::fill(&mut self.session).map_err(|error| {
            Trouble::local(Cause::Host {
                doing: "choosing a session's number",
                error: error.into(),
            })
        })?;
        let accept = Accept {
            session: self.session,
            data_channels: DATA_CHANNELS,
        };
        self.say(&Message::Accept(accept), "accepting the machine")
    }

    fn attach(&mut self) -> Result<(), Trouble> {
        let messages = self.messages()?;
        let patience = Patience {
            alarm: Some(messages.as_fd()),
            ..self.patience(
                Limit::within(self.options.connect_timeout),
                "waiting for the data channel",
            )
        };
        let known = |bytes: &[u8]| match Attach::read_from_bytes(bytes) {
            Ok(attach) if attach.magic != ATTACH_MAGIC => Err("it is no data channel".to_owned()),
            Ok(attach) if attach.session != self.session => {
                Err("it belongs to another move".to_owned())
            }
            Ok(attach) if attach.index.get() >= DATA_CHANNELS => {
                Err("it is one too many".to_owned())
            }
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        };
        let slowest = self.options.connect_timeout;
        match lobby::wait_for(self.listener, Attach::SIZE, slowest, &patience, &known) {
            Ok((channel, _)) => {
                self.data = Some(channel);
                Ok(())
            }
            // Nothing may come on the control channel now, unless the source gives up.
            Err(Stop::Alarm) => Err(unexpected(&self.expect(&patience)?, "a data channel")),
            Err(stop) => Err(Trouble::from_stop(stop, patience.doing)),
        }
    }

    fn receive_memory(&mut self) -> Result<(), Trouble> {
        const DOING: &str = "receiving memory";
        let (Some(ram), Some(data)) = (self.ram.clone(), self.data.take()) else {
            return Err(Trouble::local(ProtocolError::MemoryMismatch));
        };
        let mut receiver = PageReceiver::new(&ram);
        let (mut round, mut last) = (Round::new(1), None);
        while last != Some(self.rounds) {
            // Pages and the state come by different ways. Between two batches either may be next.
            let patience = Patience {
                alarm: Some(self.messages()?.as_fd()),
                ..self.patience(Limit::Idle(self.options.peer_timeout), DOING)
            };
            match data.wait_readable(&patience) {
                Ok(()) => {}
                Err(Stop::Alarm) => {
                    let patience = self.patience(
                        Limit::Idle(self.options.peer_timeout),
                        "receiving the state",
                    );
                    match self.expect(&patience)? {
                        Message::State(state) if last.is_none() => {
                            last = Some(self.take_state(*state)?);
                        }
                        other => return Err(unexpected(&other, "memory or the state")),
                    }
                    continue;
                }
                Err(stop) => return Err(self.last_words(Trouble::from_stop(stop, DOING))),
            }
            let patience = self.patience(Limit::Idle(self.options.peer_timeout), DOING);
            match receiver.receive(&data, round.number, &patience) {
                Ok(Arrived::Pages { bytes, zero_pages }) => {
                    round.bytes += bytes;
                    round.pages += bytes / memory::PAGE_SIZE + zero_pages;
                    self.bytes_received += bytes;
                    self.show(&round, zero_pages);
                }
                Ok(Arrived::RoundEnd) => {
                    self.end_round(&round)?;
                    if last.is_some_and(|last| last < round.number) {
                        return Err(Trouble::local(ProtocolError::Mismatch {
                            field: "round",
                            found: round.number.into(),
                            expected: last.unwrap_or_default().into(),
                        }));
                    }
                    round = Round::new(round.number.saturating_add(1));
                }
                Err(pages::Trouble::Memory(error)) => return Err(Trouble::local(error)),
                Err(pages::Trouble::Channel(stop)) => {
                    return Err(self.last_words(Trouble::from_stop(stop, DOING)));
                }
            }
            if self.control.is_cancelled() {
                return Err(Trouble::local(Cause::Cancelled));
            }
        }
        self.data = Some(data);
        Ok(())
    }

    fn restore(&mut self) -> Result<(), Trouble> {
        let state = self.state.take().unwrap_or_default();
        self.machine.restore(&state).map_err(|error| {
            Trouble::local(Cause::Machine {
                doing: "restoring the machine",
                error,
            })
        })
    }

    fn await_commit(&mut self) -> Result<(), Trouble> {
        let limit = Limit::within(self.options.peer_timeout);
        match self.expect(&self.patience(limit, "waiting for the commit"))? {
            Message::Commit if self.control.close() => Ok(()),
            Message::Commit => Err(Trouble::local(Cause::Cancelled)),
            other => Err(unexpected(&other, "commit")),
        }
    }

    fn resume(&mut self) -> Result<(), Trouble> {
        self.machine.resume().map_err(|error| {
            Trouble::local(Cause::Machine {
                doing: "starting the guest",
                error,
            })
        })
    }

    fn discard(&mut self) -> Result<(), Trouble> {
        self.state = None;
        self.ram = None;
        self.data = None;
        self.machine.discard();
        Ok(())
    }

    fn tell_peer(&mut self) -> Result<(), Trouble> {
        if let Some(messages) = self.messages.take() {
            messages.farewell(&match &self.cause {
                Some(Cause::Refused(reasons)) => Message::Refuse(Refuse {
                    reasons: reasons.clone(),
                }),
                cause => Message::Abort(Abort {
                    reason: cause.as_ref().map_or_else(String::new, ToString::to_string),
                }),
            });
        }
        Ok(())
    }

    // --- parts of them ---

    fn say(&self, message: &Message, doing: &'static str) -> Result<(), Trouble> {
        // What is said here is short and the source waits for it.
        let patience = Patience {
            wake: None,
            ..self.patience(Limit::within(self.options.peer_timeout), doing)
        };
        self.messages()?
            .send(message, &patience)
            .map_err(|error| self.last_words(Trouble::from_stop(error.stop, doing)))
    }

    /// The next message, unless the source gives up.
    fn expect(&self, patience: &Patience<'_>) -> Result<Message, Trouble> {
        // A cancel that comes together with the message wins; the source learns of it.
        match self.messages()?.receive(patience) {
            Ok(Message::Abort(abort)) => Err(Trouble {
                cause: Cause::PeerGaveUp {
                    reason: abort.reason,
                },
                failure: Failure::PeerGone,
            }),
            Ok(message) => Ok(message),
            Err(stop) => Err(Trouble::from_stop(stop, patience.doing)),
        }
    }

    /// A data channel that breaks does so because the source gives up, and it has said why.
    fn last_words(&self, trouble: Trouble) -> Trouble {
        if trouble.failure != Failure::PeerGone {
            return trouble;
        }
        let patience = Patience {
            wake: None,
            alarm: None,
            limit: Limit::within(LAST_WORDS),
            doing: "looking for the reason",
        };
        match self.expect(&patience) {
            Err(said) if matches!(said.cause, Cause::PeerGaveUp { .. }) => said,
            _ => trouble,
        }
    }

    fn take_state(&mut self, state: State) -> Result<u32, Trouble> {
        if state.last_round < self.rounds.max(1) {
            return Err(Trouble::local(ProtocolError::Mismatch {
                field: "last round",
                found: state.last_round.into(),
                expected: self.rounds.max(1).into(),
            }));
        }
        self.state = Some(state.machine);
        Ok(state.last_round)
    }

    fn end_round(&mut self, round: &Round) -> Result<(), Trouble> {
        self.rounds = round.number;
        let done = RoundDone {
            round: round.number,
            bytes: round.bytes,
        };
        self.say(&Message::RoundDone(done), "confirming a round")?;
        let entry = RoundProgress {
            number: round.number,
            pages: round.pages,
            bytes: round.bytes,
            ms: milliseconds(round.began),
            dirty_after: 0,
        };
        // A source that never ends must not fill this process's memory either.
        self.control.update(|progress| {
            if progress.rounds.len() < MOST_ROUNDS {
                progress.rounds.push(entry);
            }
        });
        Ok(())
    }

    fn show(&self, round: &Round, zero_pages: u64) {
        let (received, rate) = (
            self.bytes_received,
            round.bytes as f64 / round.began.elapsed().as_secs_f64().max(1e-6),
        );
        self.control.update(|progress| {
            progress.bytes_sent = received;
            progress.zero_pages += zero_pages;
            progress.rate_bytes_per_s = rate;
        });
    }
}

/// Rounds that are remembered.
const MOST_ROUNDS: usize = 10_000;

/// A round that arrives.
struct Round {
    number: u32,
    pages: u64,
    bytes: u64,
    began: Instant,
}

impl Round {
    fn new(number: u32) -> Self {
        Self {
            number,
            pages: 0,
            bytes: 0,
            began: Instant::now(),
        }
    }
}

fn unexpected(found: &Message, expected: &'static str) -> Trouble {
    Trouble::local(ProtocolError::Unexpected {
        found: found.name(),
        expected,
    })
}
