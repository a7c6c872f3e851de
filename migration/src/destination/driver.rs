//! Carries out what the [engine](super::engine) says: one function an action.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use memory::GuestRam;
use rustix::event::{PollFd, PollFlags};
use zerocopy::FromBytes;

use super::engine::{Action, End, Engine, Event, Failure};
use super::inflow::{Arrivals, Inflow, Report};
use super::pages;
use crate::channel::{Channel, Limit, Patience, Stop, poll};
use crate::clocks::{PeerClock, realtime_ns};
use crate::control::{Wake, milliseconds};
use crate::lobby::{Lobby, Wanted};
use crate::protocol::batch::Attach;
use crate::protocol::hello::{HelloBody, HelloHeader};
use crate::protocol::message::{Abort, Accept, Message, Refuse, RoundDone, State};
use crate::protocol::{ProtocolError, VERSIONS};
use crate::{
    Cause, DestinationMachine, Listener, MachineState, MoveControl, Phase, ReceiveError,
    ReceiveOptions, ReceiveReport, RoundProgress,
};

/// Data channels that are served.
const DATA_CHANNELS: u16 = 16;
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
        lobby: Lobby::default(),
        messages: None,
        hello: None,
        session: [0; 16],
        data: Vec::new(),
        farewell: None,
        ram: None,
        state: None,
        source_clock: PeerClock::default(),
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
    if let Some(channel) = driver.farewell.take() {
        channel.linger();
    }
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
    lobby: Lobby,
    /// The control channel.
    messages: Option<Channel>,
    hello: Option<HelloHeader>,
    session: [u8; 16],
    data: Vec<Channel>,
    /// The control channel after the last message.
    farewell: Option<Channel>,
    ram: Option<Arc<GuestRam>>,
    state: Option<MachineState>,
    source_clock: PeerClock,
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
            beat: None,
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
        let mut lobby = std::mem::take(&mut self.lobby);
        let limit = self.options.wait.map_or(Limit::Forever, Limit::within);
        let patience = self.patience(limit, "waiting for a source");
        let known = |bytes: &[u8]| match HelloHeader::read_from_bytes(bytes) {
            Ok(header) => header.check().map(drop).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let wanted = Wanted {
            size: HelloHeader::SIZE,
            known: &known,
            slowest: self.options.connect_timeout,
        };
        let found = lobby.find(self.listener, wanted, &patience);
        let (channel, bytes) = found.map_err(|stop| Trouble::from_stop(stop, patience.doing))?;
        self.lobby = lobby;
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
        self.source_clock.heard(manifest.sent_ns, realtime_ns());
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
        let mut lobby = std::mem::take(&mut self.lobby);
        let messages = self.messages()?;
        let patience = Patience {
            alarm: Some(messages),
            ..self.patience(
                Limit::within(self.options.connect_timeout),
                "waiting for the data channels",
            )
        };
        let known = |bytes: &[u8]| match Attach::read_from_bytes(bytes) {
            Ok(attach) => attach
                .check(self.session, DATA_CHANNELS)
                .map_err(str::to_owned),
            Err(error) => Err(error.to_string()),
        };
        let wanted = Wanted {
            size: Attach::SIZE,
            known: &known,
            slowest: self.options.connect_timeout,
        };
        let (mut data, mut indices, mut count) = (Vec::new(), BTreeSet::new(), 1);
        while data.len() < usize::from(count) {
            match lobby.find(self.listener, wanted, &patience) {
                Ok((channel, bytes)) => {
                    let attach = Attach::read_from_bytes(&bytes)
                        .map_err(|_| Trouble::local(ProtocolError::MemoryMismatch))?;
                    let found = attach.count.get();
                    if !data.is_empty() && found != count || !indices.insert(attach.index.get()) {
                        return Err(Trouble::local(ProtocolError::Mismatch {
                            field: "number of data channels",
                            found: found.into(),
                            expected: count.into(),
                        }));
                    }
                    count = found;
                    data.push(channel);
                }
                // Nothing may come on the control channel now, unless the source gives up.
                Err(Stop::Alarm) => {
                    let patience = Patience {
                        alarm: None,
                        ..patience
                    };
                    return Err(unexpected(&self.expect(&patience)?, "a data channel"));
                }
                Err(stop) => return Err(Trouble::from_stop(stop, patience.doing)),
            }
        }
        self.data = data;
        Ok(())
    }

    fn receive_memory(&mut self) -> Result<(), Trouble> {
        let Some(ram) = self.ram.clone() else {
            return Err(Trouble::local(ProtocolError::MemoryMismatch));
        };
        let (data, control, wake) = (
            std::mem::take(&mut self.data),
            self.control,
            self.wake.clone(),
        );
        let began = Instant::now();
        let on_arrival = |arrivals: Arrivals| {
            control.update(|progress| {
                progress.bytes_sent += arrivals.bytes;
                progress.zero_pages += arrivals.zero_pages;
                if progress.rounds.is_empty() {
                    let seconds = began.elapsed().as_secs_f64().max(1e-6);
                    progress.rate_bytes_per_s = progress.bytes_sent as f64 / seconds;
                }
            });
        };
        let host = |error| {
            Trouble::local(Cause::Host {
                doing: "starting to receive memory",
                error,
            })
        };
        let inflow = Inflow::new(&ram, &wake, &on_arrival).map_err(host)?;
        let result = std::thread::scope(|scope| {
            let mut result = Ok(());
            for channel in &data {
                let inflow = &inflow;
                let thread = std::thread::Builder::new().name("move-receive".into());
                if let Err(error) = thread.spawn_scoped(scope, move || inflow.run(channel)) {
                    result = Err(host(error));
                }
            }
            let result = result.and_then(|()| self.follow_rounds(&inflow, data.len()));
            data.iter().for_each(Channel::shut);
            result
        });
        self.data = data;
        result
    }

    /// Until the state and its last round are here.
    fn follow_rounds(&mut self, inflow: &Inflow<'_>, channels: usize) -> Result<(), Trouble> {
        const DOING: &str = "receiving memory";
        let (mut round, mut last, mut ended) = (Round::new(1), None, 0);
        let (mut beat, mut alive) = (0, Instant::now());
        while last != Some(self.rounds) {
            let idle_end = alive + self.options.peer_timeout;
            let (message, rung) =
                self.wait_for_either(inflow, Limit::Until(idle_end, self.options.peer_timeout))?;
            let moved = inflow.beat.load(Ordering::Relaxed);
            if moved != beat || message || rung {
                (beat, alive) = (moved, Instant::now());
            } else if Instant::now() >= idle_end {
                let stop = Stop::Timeout(self.options.peer_timeout);
                return Err(Trouble::from_stop(stop, DOING));
            }
            while let Some(report) = inflow.next_report() {
                match report {
                    Report::RoundEnd(number) if number == round.number => {
                        ended += 1;
                        if ended == channels {
                            self.end_round(&round, inflow.take_arrivals())?;
                            (round, ended) = (Round::new(number.saturating_add(1)), 0);
                        }
                    }
                    Report::RoundEnd(number) => {
                        return Err(mismatch("round", number, round.number));
                    }
                    Report::Failed(pages::Trouble::Memory(error)) => {
                        return Err(Trouble::local(error));
                    }
                    Report::Failed(pages::Trouble::Channel(stop)) => {
                        return Err(self.last_words(Trouble::from_stop(stop, DOING)));
                    }
                }
            }
            if message {
                let limit = Limit::Idle(self.options.peer_timeout);
                match self.expect_one(&self.patience(limit, "receiving the state"))? {
                    Some(Message::State(state)) if last.is_none() => {
                        last = Some(self.take_state(*state)?);
                    }
                    Some(other) => return Err(unexpected(&other, "memory or the state")),
                    None => {}
                }
            }
            if let Some(last) = last.filter(|last| *last < self.rounds) {
                return Err(mismatch("round", self.rounds, last));
            }
        }
        Ok(())
    }

    /// Waits until a message can be read or the bell rings, and tells which.
    fn wait_for_either(&self, inflow: &Inflow<'_>, limit: Limit) -> Result<(bool, bool), Trouble> {
        let doing = "receiving memory";
        let bell = inflow.bell();
        let mut fds = [
            PollFd::new(self.messages()?, PollFlags::IN),
            PollFd::new(&bell, PollFlags::IN),
            PollFd::new(&self.wake, PollFlags::IN),
        ];
        poll(&mut fds, limit).map_err(|stop| Trouble::from_stop(stop, doing))?;
        let [message, rung, cancelled] = fds.map(|fd| !fd.revents().is_empty());
        match cancelled {
            true => Err(Trouble::from_stop(Stop::Cancelled, doing)),
            false => Ok((message, rung)),
        }
    }

    fn restore(&mut self) -> Result<(), Trouble> {
        let state = self.state.take().unwrap_or_default();
        self.machine.restore(state).map_err(|error| {
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

    fn tell_peer(&mut self) -> Result<(), Trouble> {
        if let Some(messages) = self.messages.take() {
            messages.say_goodbye(&match &self.cause {
                Some(Cause::Refused(reasons)) => Message::Refuse(Refuse {
                    reasons: reasons.clone(),
                }),
                cause => Message::Abort(Abort {
                    reason: cause.as_ref().map_or_else(String::new, ToString::to_string),
                }),
            });
            self.farewell = Some(messages);
        }
        Ok(())
    }

    fn discard(&mut self) -> Result<(), Trouble> {
        self.lobby = Lobby::default();
        self.state = None;
        self.ram = None;
        self.data.clear();
        self.machine.discard();
        Ok(())
    }

    // --- parts of them ---

    fn say(&self, message: &Message, doing: &'static str) -> Result<(), Trouble> {
        // What is said here is short and the source waits for it.
        let patience = Patience::uninterrupted(Limit::within(self.options.peer_timeout), doing);
        self.messages()?
            .send(message, &patience)
            .map_err(|error| self.last_words(Trouble::from_stop(error.stop, doing)))
    }

    /// The next message, unless the source gives up.
    fn expect(&self, patience: &Patience<'_>) -> Result<Message, Trouble> {
        self.messages()?
            .receive(patience)
            .map_err(|stop| Trouble::from_stop(stop, patience.doing))
            .and_then(unless_given_up)
    }

    /// The same, or `None` if it is a message to be skipped.
    fn expect_one(&self, patience: &Patience<'_>) -> Result<Option<Message>, Trouble> {
        self.messages()?
            .receive_one(patience)
            .map_err(|stop| Trouble::from_stop(stop, patience.doing))
            .and_then(|message| message.map(unless_given_up).transpose())
    }

    /// A data channel that breaks does so because the source gives up, and it has said why.
    fn last_words(&self, trouble: Trouble) -> Trouble {
        if trouble.failure != Failure::PeerGone {
            return trouble;
        }
        let patience = Patience::uninterrupted(Limit::within(LAST_WORDS), "looking for the reason");
        match self.expect(&patience) {
            Err(said) if matches!(said.cause, Cause::PeerGaveUp { .. }) => said,
            _ => trouble,
        }
    }

    fn take_state(&mut self, state: State) -> Result<u32, Trouble> {
        if state.last_round < self.rounds.max(1) {
            return Err(mismatch("last round", state.last_round, self.rounds.max(1)));
        }
        self.source_clock.heard(state.sent_ns, realtime_ns());
        let mut machine = state.machine;
        if let Some(saved_ns) = &mut machine.clock.host_realtime_ns {
            *saved_ns = self.source_clock.here(*saved_ns);
        }
        self.state = Some(machine);
        Ok(state.last_round)
    }

    fn end_round(&mut self, round: &Round, arrivals: Arrivals) -> Result<(), Trouble> {
        self.rounds = round.number;
        self.bytes_received += arrivals.bytes;
        let done = RoundDone {
            round: round.number,
            bytes: arrivals.bytes,
        };
        self.say(&Message::RoundDone(done), "confirming a round")?;
        let entry = RoundProgress {
            number: round.number,
            pages: arrivals.pages(),
            bytes: arrivals.bytes,
            ms: milliseconds(round.began),
            dirty_after: 0,
        };
        self.control.update(|progress| {
            progress.rate_bytes_per_s = entry.bytes as f64 / (entry.ms / 1e3).max(1e-6);
            // A source that never ends must not fill this process's memory either.
            if progress.rounds.len() < MOST_ROUNDS {
                progress.rounds.push(entry);
            }
        });
        Ok(())
    }
}

/// Rounds that are remembered.
const MOST_ROUNDS: usize = 10_000;

/// A round that arrives.
struct Round {
    number: u32,
    began: Instant,
}

impl Round {
    fn new(number: u32) -> Self {
        Self {
            number,
            began: Instant::now(),
        }
    }
}

fn unless_given_up(message: Message) -> Result<Message, Trouble> {
    match message {
        Message::Abort(abort) => Err(Trouble {
            cause: Cause::PeerGaveUp {
                reason: abort.reason,
            },
            failure: Failure::PeerGone,
        }),
        message => Ok(message),
    }
}

fn unexpected(found: &Message, expected: &'static str) -> Trouble {
    Trouble::local(ProtocolError::Unexpected {
        found: found.name(),
        expected,
    })
}

fn mismatch(field: &'static str, found: u32, expected: u32) -> Trouble {
    Trouble::local(ProtocolError::Mismatch {
        field,
        found: found.into(),
        expected: expected.into(),
    })
}
