//! Carries out what the [engine](super::engine) says: one function an action.

use std::sync::Arc;
use std::time::{Duration, Instant};

use memory::{GuestRam, PAGE_SIZE, PageBitmap};
use zerocopy::IntoBytes;

use super::convergence::{Limits, RoundStats};
use super::engine::{Action, End, Engine, Event, Failure};
use super::link::{
    Link, Trouble, check_round_done, not_open, receive, receive_one, send_message, unexpected,
};
use super::round::{Pages, Round, Totals};
use crate::channel::{Channel, Limit, Patience, Stop};
use crate::clocks::realtime_ns;
use crate::connect::{connect, open};
use crate::control::{Wake, milliseconds};
use crate::protocol::batch::Attach;
use crate::protocol::hello::HelloBody;
use crate::protocol::message::{Abort, Accept, Message, State};
use crate::protocol::{ProtocolError, VERSIONS};
use crate::{
    Cause, MoveControl, MoveUrl, Phase, RoundProgress, SendError, SendOptions, SendReport,
    SourceMachine, SourceOutcome,
};

/// Moves a machine away.
///
/// On success the guest runs at the destination and stays paused here for good. On failure the error says where it is:
/// here as it was before, except for the cases of [`SourceOutcome`]. `control` shows the progress, and cancels.
pub fn send(
    url: &MoveUrl,
    machine: &mut dyn SourceMachine,
    options: &SendOptions,
    control: &MoveControl,
) -> Result<SendReport, SendError> {
    let wake = control.begin().map_err(|error| SendError {
        phase: Phase::Connect,
        cause: Cause::Host {
            doing: "making an event descriptor",
            error,
        },
        outcome: SourceOutcome::RunningHere,
    })?;
    let mut engine = Engine::new(Limits {
        downtime: Duration::from_millis(options.downtime_ms),
        timeout: Duration::from_secs(options.timeout_s),
        max_rounds: options.max_rounds,
        strategy: options.timeout_strategy,
    });
    let mut driver = Driver {
        url,
        machine,
        options,
        control,
        wake,
        began: Instant::now(),
        precopy_began: None,
        paused: None,
        link: None,
        farewell: None,
        ram: None,
        dirty: Vec::new(),
        rounds: Vec::new(),
        sent: Totals::default(),
        last_round: Totals::default(),
        downtime_ms: 0.0,
        cause: None,
    };
    let end = loop {
        control.update(|progress| progress.phase = engine.phase());
        let action = engine.action();
        if let Action::Finish(end) = action {
            break end;
        }
        tracing::debug!(?action, "source");
        engine.handle(driver.perform(action));
        driver.after(&engine);
    };
    control.end();
    if let Some(channel) = driver.farewell.take() {
        channel.linger();
    }
    driver.result(end, &engine)
}

/// What the guest does while a round is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guest {
    Runs,
    StandsStill,
}

struct Driver<'a> {
    url: &'a MoveUrl,
    machine: &'a mut dyn SourceMachine,
    options: &'a SendOptions,
    control: &'a MoveControl,
    wake: Wake,
    began: Instant,
    precopy_began: Option<Instant>,
    paused: Option<Instant>,
    link: Option<Link>,
    /// The control channel after the last message.
    farewell: Option<Channel>,
    ram: Option<Arc<GuestRam>>,
    /// What is still to be sent, by region.
    dirty: Vec<PageBitmap>,
    rounds: Vec<RoundProgress>,
    /// Of all rounds that have been sent.
    sent: Totals,
    /// Of the last one, whose arrival is still to be confirmed.
    last_round: Totals,
    downtime_ms: f64,
    /// Why the move fails: the first reason.
    cause: Option<Cause>,
}

impl Driver<'_> {
    fn perform(&mut self, action: Action) -> Event {
        let result = match action {
            Action::Connect => self.connect(),
            Action::Negotiate => self.negotiate(),
            Action::Reserve => self.reserve(),
            Action::Track => self.track(),
            Action::SendRound(number) => match self.send_round(number) {
                Ok(event) => return event,
                Err(trouble) => Err(trouble),
            },
            Action::Pause => self.pause(),
            Action::SendLastRound(number) => self.send_last_round(number),
            Action::SendState(number) => self.send_state(number),
            Action::AwaitReady => self.await_ready(),
            Action::Commit => self.commit(),
            Action::AwaitResumed => self.await_resumed(),
            Action::TellPeer => self.tell_peer(),
            Action::TakeBack => self.take_back(),
            Action::Finish(_) => Ok(()),
        };
        match result {
            Ok(()) => Event::Done,
            Err(Trouble { cause, failure }) => {
                tracing::debug!(%cause, ?failure, ?action, "source");
                self.cause.get_or_insert(cause);
                Event::Failed(failure)
            }
        }
    }

    /// What the engine's decision changes besides the next action.
    fn after(&mut self, engine: &Engine) {
        let estimated = engine.estimated_downtime();
        if !self.rounds.is_empty() && self.paused.is_none() {
            let ms = estimated.as_secs_f64() * 1e3;
            self.control
                .update(|progress| progress.estimated_downtime_ms = Some(ms));
        }
        if engine.action() == Action::TellPeer && self.cause.is_none() {
            self.cause = Some(Cause::NotConverging {
                rounds: self.rounds.len() as u32,
                seconds: self
                    .precopy_began
                    .map_or(0, |began| began.elapsed().as_secs()),
                estimated_ms: u64::try_from(estimated.as_millis()).unwrap_or(u64::MAX),
            });
        }
    }

    fn result(self, end: End, engine: &Engine) -> Result<SendReport, SendError> {
        match end {
            End::Moved => Ok(SendReport {
                rounds: self.rounds,
                total_ms: milliseconds(self.began),
                downtime_ms: self.downtime_ms,
                estimated_downtime_ms: engine.estimated_downtime().as_secs_f64() * 1e3,
                ram_bytes: self.ram.map_or(0, |ram| ram.total_bytes()),
                bytes_sent: self.sent.bytes,
                zero_pages: self.sent.zero_pages,
            }),
            End::Failed { outcome, phase } => Err(SendError {
                phase,
                cause: self.cause.unwrap_or(Cause::Cancelled),
                outcome,
            }),
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

    fn link(&self) -> Result<&Link, Trouble> {
        self.link
            .as_ref()
            .ok_or_else(|| Trouble::from_stop(Stop::Lost(not_open()), "moving"))
    }

    fn ram(&self) -> Result<&Arc<GuestRam>, Trouble> {
        self.ram
            .as_ref()
            .ok_or_else(|| Trouble::local(ProtocolError::MemoryMismatch))
    }

    // --- one function an action ---

    fn connect(&mut self) -> Result<(), Trouble> {
        let limit = Limit::within(self.options.connect_timeout);
        let (control, target) =
            connect(self.url, &self.patience(limit, "connecting")).map_err(Trouble::local)?;
        tracing::info!(peer = control.peer(), "connected");
        self.link = Some(Link {
            control,
            target,
            data: Vec::new(),
        });
        Ok(())
    }

    fn negotiate(&mut self) -> Result<(), Trouble> {
        const DOING: &str = "negotiating";
        let patience = self.patience(Limit::within(self.options.connect_timeout), DOING);
        let channel = &self.link()?.control;
        let body = HelloBody {
            features: Vec::new(),
            vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let exchange = || {
            channel.send_hello(&body, &patience)?;
            let header = channel.receive_hello_header(&patience)?;
            let versions = header.check()?;
            let theirs = channel.receive_hello_body(&header, &patience)?;
            Ok((VERSIONS.newest_common(versions)?, theirs))
        };
        let (version, theirs) = exchange().map_err(|stop: Stop| Trouble::from_stop(stop, DOING))?;
        tracing::info!(version, peer = theirs.vmm_version, "negotiated");
        Ok(())
    }

    fn reserve(&mut self) -> Result<(), Trouble> {
        const DOING: &str = "waiting for the destination to build the machine";
        let mut manifest = self
            .machine
            .manifest()
            .map_err(Trouble::machine("describing the machine"))?;
        manifest.sent_ns = Some(realtime_ns());
        let message = Message::Manifest(Box::new(manifest));
        let patience = self.patience(Limit::within(self.options.reserve_timeout), DOING);
        let link = self.link()?;
        send_message(&link.control, &message, &patience)
            .map_err(|trouble| link.last_words(trouble))?;
        let accept = match receive(&link.control, &patience)? {
            Message::Accept(accept) => accept,
            other => return Err(unexpected(&other, "accept or refuse")),
        };
        let data = self.open_data_channels(&accept)?;
        if let Some(link) = &mut self.link {
            link.data = data;
        }
        let ram = self.machine.ram();
        let total = ram.total_bytes();
        self.control.update(|progress| {
            progress.bytes_total = total;
            progress.bytes_remaining = total;
        });
        self.dirty = ram
            .regions()
            .iter()
            .map(|region| PageBitmap::new(region.pages()))
            .collect();
        self.ram = Some(ram);
        Ok(())
    }

    fn open_data_channels(&self, accept: &Accept) -> Result<Vec<Channel>, Trouble> {
        let wanted = self
            .options
            .data_channels
            .unwrap_or_else(SendOptions::usual_data_channels);
        let count = wanted.get().min(accept.data_channels);
        if count == 0 {
            return Err(Trouble::local(ProtocolError::Mismatch {
                field: "number of data channels",
                found: 0,
                expected: 1,
            }));
        }
        let patience = self.patience(
            Limit::within(self.options.connect_timeout),
            "opening the data channels",
        );
        let link = self.link()?;
        let open_one = |index: u16| {
            let channel = open(&link.target, &patience)?;
            let attach = Attach::new(accept.session, index, count);
            channel
                .write_all(attach.as_bytes(), &patience)
                .map_err(|error| error.stop)?;
            Ok(channel)
        };
        (0..count)
            .map(open_one)
            .collect::<Result<_, _>>()
            .map_err(|stop| link.last_words(Trouble::from_stop(stop, patience.doing)))
    }

    fn track(&mut self) -> Result<(), Trouble> {
        self.precopy_began = Some(Instant::now());
        self.machine
            .start_dirty_tracking()
            .map_err(Trouble::machine("starting to track dirty pages"))
    }

    fn send_round(&mut self, number: u32) -> Result<Event, Trouble> {
        const DOING: &str = "waiting for a round of memory to arrive";
        let began = Instant::now();
        let mut totals = self.transfer(number, Guest::Runs)?;
        let waiting = Instant::now();
        let patience = self.patience(Limit::Idle(self.options.peer_timeout), DOING);
        let done = receive(&self.link()?.control, &patience)?;
        check_round_done(&done, number, &totals)?;
        totals.sending += waiting.elapsed();
        self.fetch_dirty()?;
        let dirty_after = count(&self.dirty);
        let elapsed = began.elapsed();
        self.add_round(number, &totals, elapsed, dirty_after);
        let stats = RoundStats {
            pages: totals.pages,
            bytes: totals.bytes,
            elapsed,
            sending: totals.sending,
            dirty_after,
        };
        let since_start = self.precopy_began.map_or(elapsed, |began| began.elapsed());
        Ok(Event::RoundDone { stats, since_start })
    }

    fn pause(&mut self) -> Result<(), Trouble> {
        if self.control.is_cancelled() {
            return Err(Trouble::local(Cause::Cancelled));
        }
        self.paused = Some(Instant::now());
        self.machine
            .pause()
            .map_err(Trouble::machine("pausing the guest"))?;
        // What was dirty after the last round is not re-armed, and is still in `dirty`.
        self.fetch_dirty()
    }

    fn send_last_round(&mut self, number: u32) -> Result<(), Trouble> {
        let began = Instant::now();
        self.last_round = self.transfer(number, Guest::StandsStill)?;
        let totals = self.last_round;
        self.add_round(number, &totals, began.elapsed(), 0);
        Ok(())
    }

    fn send_state(&mut self, last_round: u32) -> Result<(), Trouble> {
        let machine = self
            .machine
            .save_state()
            .map_err(Trouble::machine("saving the machine's state"))?;
        let message = Message::State(Box::new(State {
            last_round,
            machine,
            sent_ns: Some(realtime_ns()),
        }));
        let patience = self.patience(
            Limit::Idle(self.options.peer_timeout),
            "sending the machine's state",
        );
        let link = self.link()?;
        send_message(&link.control, &message, &patience).map_err(|trouble| link.last_words(trouble))
    }

    fn await_ready(&mut self) -> Result<(), Trouble> {
        const DOING: &str = "waiting for the destination to restore the machine";
        let patience = self.patience(Limit::within(self.options.handover_timeout), DOING);
        let control = &self.link()?.control;
        let last = self.rounds.last().map_or(0, |round| round.number);
        check_round_done(&receive(control, &patience)?, last, &self.last_round)?;
        match receive(control, &patience)? {
            Message::Ready => Ok(()),
            other => Err(unexpected(&other, "ready")),
        }
    }

    fn commit(&mut self) -> Result<(), Trouble> {
        if !self.control.close() {
            return Err(Trouble::local(Cause::Cancelled));
        }
        let limit = Limit::within(self.options.handover_timeout);
        let patience = Patience::uninterrupted(limit, "sending the commit");
        let control = &self.link()?.control;
        while control.is_readable() {
            // Not a byte of the commit has left yet.
            let local = |trouble: Trouble| match trouble.failure {
                Failure::PeerSaysNo => trouble,
                _ => Trouble::local(trouble.cause),
            };
            // A no, the end of the connection, or something that may be skipped.
            if let Some(message) = receive_one(control, &patience).map_err(local)? {
                return Err(unexpected(&message, "nothing"));
            }
        }
        control
            .send(&Message::Commit, &patience)
            .map_err(|error| match error.nothing_left {
                true => Trouble::local(error.stop.into_cause(patience.doing)),
                false => Trouble {
                    failure: Failure::PeerLost,
                    ..Trouble::from_stop(error.stop, patience.doing)
                },
            })
    }

    fn await_resumed(&mut self) -> Result<(), Trouble> {
        const DOING: &str = "waiting for the destination to say that the guest runs";
        let patience = Patience::uninterrupted(Limit::within(self.options.handover_timeout), DOING);
        match receive(&self.link()?.control, &patience)? {
            Message::Resumed => {}
            other => return Err(unexpected(&other, "resumed")),
        }
        let downtime_ms = self.paused.map_or(0.0, milliseconds);
        self.downtime_ms = downtime_ms;
        self.control
            .update(|progress| progress.downtime_ms = Some(downtime_ms));
        Ok(())
    }

    fn tell_peer(&mut self) -> Result<(), Trouble> {
        if let Some(link) = self.link.take() {
            // Closed first, so that a destination in the middle of a batch looks for the reason.
            drop(link.data);
            let reason = self.reason();
            link.control.say_goodbye(&Message::Abort(Abort { reason }));
            self.farewell = Some(link.control);
        }
        Ok(())
    }

    fn take_back(&mut self) -> Result<(), Trouble> {
        self.link = None;
        self.machine.stop_dirty_tracking();
        self.machine
            .resume()
            .map_err(Trouble::machine("resuming the guest"))
    }

    // --- parts of them ---

    fn reason(&self) -> String {
        self.cause
            .as_ref()
            .map_or_else(String::new, ToString::to_string)
    }

    /// Sends what is dirty, or in the first round everything, and the mark of the round's end.
    fn transfer(&mut self, number: u32, guest: Guest) -> Result<Totals, Trouble> {
        let ram = Arc::clone(self.ram()?);
        let dirty = std::mem::take(&mut self.dirty);
        let (pages, to_look_at) = match (number, guest) {
            (1, Guest::Runs) => (Pages::All, ram.total_bytes()),
            _ => (Pages::Dirty(&dirty), count(&dirty) * PAGE_SIZE),
        };
        let (control, began, before) = (self.control, Instant::now(), self.sent);
        let progress = |totals: &Totals| {
            control.update(|progress| {
                progress.bytes_sent = before.bytes + totals.bytes;
                progress.zero_pages = before.zero_pages + totals.zero_pages;
                progress.bytes_remaining = to_look_at.saturating_sub(totals.pages * PAGE_SIZE);
                if number == 1 {
                    let seconds = began.elapsed().as_secs_f64();
                    progress.rate_bytes_per_s = totals.bytes as f64 / seconds.max(1e-6);
                }
            });
            // A connection that is always ready never waits, and so never looks.
            match control.is_cancelled() {
                true => Err(Trouble::local(Cause::Cancelled)),
                false => Ok(()),
            }
        };
        let Some(link) = &self.link else {
            return Err(Trouble::from_stop(Stop::Lost(not_open()), "sending memory"));
        };
        let patience = Patience {
            wake: Some(&self.wake),
            // While memory travels the destination says nothing, unless it gives up.
            alarm: Some(&link.control),
            beat: None,
            limit: Limit::Idle(self.options.peer_timeout),
            doing: "sending memory",
        };
        let machine = match guest {
            Guest::Runs => Some(&mut *self.machine),
            Guest::StandsStill => None,
        };
        let totals = Round::new(number, &ram, pages, machine, &progress)
            .send(&link.data, patience)
            .map_err(|trouble| link.last_words(trouble))?;
        self.dirty = dirty;
        self.dirty.iter_mut().for_each(PageBitmap::clear_all);
        self.sent.pages += totals.pages;
        self.sent.bytes += totals.bytes;
        self.sent.zero_pages += totals.zero_pages;
        Ok(totals)
    }

    fn fetch_dirty(&mut self) -> Result<(), Trouble> {
        for (region, into) in self.dirty.iter_mut().enumerate() {
            self.machine
                .fetch_dirty(region, into)
                .map_err(Trouble::machine("reading the dirty log"))?;
        }
        Ok(())
    }

    fn add_round(&mut self, number: u32, totals: &Totals, elapsed: Duration, dirty_after: u64) {
        let round = RoundProgress {
            number,
            pages: totals.pages,
            bytes: totals.bytes,
            ms: elapsed.as_secs_f64() * 1e3,
            dirty_after,
        };
        tracing::debug!(?round, "round");
        self.rounds.push(round);
        let sent = self.sent;
        self.control.update(|progress| {
            progress.rounds.push(round);
            progress.bytes_sent = sent.bytes;
            progress.zero_pages = sent.zero_pages;
            progress.bytes_remaining = dirty_after * PAGE_SIZE;
            progress.rate_bytes_per_s = totals.bytes as f64 / elapsed.as_secs_f64().max(1e-6);
        });
    }
}

/// Pages in all of them.
fn count(bitmaps: &[PageBitmap]) -> u64 {
    bitmaps.iter().map(PageBitmap::count).sum()
}
