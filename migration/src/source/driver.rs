//! Carries out what the [engine](super::engine) says: one function an action.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memory::{GuestRam, PAGE_SIZE, PageBitmap};
use zerocopy::IntoBytes;

use super::convergence::{Limits, RoundStats};
use super::engine::{Action, End, Engine, Event, Failure};
use super::link::{Link, Trouble, check_round_done, not_open, receive, send_message, unexpected};
use super::round::{Round, Totals};
use crate::channel::{Limit, Patience, Stop};
use crate::connect::connect;
use crate::control::{Wake, milliseconds};
use crate::protocol::batch::{ATTACH_MAGIC, Attach};
use crate::protocol::hello::HelloBody;
use crate::protocol::message::{Abort, Message, State};
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
        let channel =
            connect(self.url, &self.patience(limit, "connecting")).map_err(Trouble::local)?;
        tracing::info!(peer = channel.peer(), "connected");
        self.link = Some(Link {
            control: channel,
            data: None,
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
        let manifest = self
            .machine
            .manifest()
            .map_err(Trouble::machine("describing the machine"))?;
        let ram = self.machine.ram();
        let message = Message::Manifest(Box::new(manifest));
        let patience = self.patience(Limit::within(self.options.reserve_timeout), DOING);
        let control = &self.link()?.control;
        send_message(control, &message, &patience).map_err(|trouble| self.last_words(trouble))?;
        let accept = match receive(control, &patience)? {
            Message::Accept(accept) => accept,
            other => return Err(unexpected(&other, "accept or refuse")),
        };
        if accept.data_channels == 0 {
            return Err(Trouble::local(ProtocolError::Mismatch {
                field: "number of data channels",
                found: 0,
                expected: 1,
            }));
        }
        let patience = self.patience(
            Limit::within(self.options.connect_timeout),
            "opening a data channel",
        );
        let data =
            connect(self.url, &patience).map_err(|cause| self.last_words(Trouble::local(cause)))?;
        let attach = Attach {
            magic: ATTACH_MAGIC,
            session: accept.session,
            index: 0.into(),
            reserved: [0; 6],
        };
        data.write_all(attach.as_bytes(), &patience)
            .map_err(|error| self.last_words(Trouble::from_stop(error.stop, patience.doing)))?;
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
        if let Some(link) = &mut self.link {
            link.data = Some(data);
        }
        Ok(())
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
        let dirty_after = self.dirty.iter().map(PageBitmap::count).sum();
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
        }));
        let patience = self.patience(
            Limit::Idle(self.options.peer_timeout),
            "sending the machine's state",
        );
        send_message(&self.link()?.control, &message, &patience)
            .map_err(|trouble| self.last_words(trouble))
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
        let patience = Patience {
            wake: None,
            ..self.patience(
                Limit::within(self.options.handover_timeout),
                "sending the commit",
            )
        };
        let control = &self.link()?.control;
        if control.is_readable() {
            // Nothing but a no, or the end of the connection, can come here.
            let message = receive(control, &patience).map_err(|trouble| Trouble {
                failure: match trouble.failure {
                    Failure::PeerSaysNo => Failure::PeerSaysNo,
                    // Not a byte of the commit has left.
                    Failure::PeerLost | Failure::Local => Failure::Local,
                },
                ..trouble
            })?;
            return Err(unexpected(&message, "nothing"));
        }
        control.send(&Message::Commit, &patience).map_err(|error| {
            let trouble = Trouble::from_stop(error.stop, patience.doing);
            let failure = if error.nothing_left {
                Failure::Local
            } else {
                Failure::PeerLost
            };
            Trouble { failure, ..trouble }
        })
    }

    fn await_resumed(&mut self) -> Result<(), Trouble> {
        const DOING: &str = "waiting for the destination to say that the guest runs";
        let patience = Patience {
            wake: None,
            ..self.patience(Limit::within(self.options.handover_timeout), DOING)
        };
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
            let reason = self
                .cause
                .as_ref()
                .map_or_else(String::new, ToString::to_string);
            link.control.farewell(&Message::Abort(Abort { reason }));
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

    /// Sends what is dirty, or in the first round everything, and the mark of the round's end.
    fn transfer(&mut self, number: u32, guest: Guest) -> Result<Totals, Trouble> {
        let ram = Arc::clone(self.ram()?);
        let dirty = std::mem::take(&mut self.dirty);
        let (control, began, before) = (self.control, Instant::now(), self.sent);
        let to_look_at = match number {
            1 => ram.total_bytes(),
            _ => dirty.iter().map(PageBitmap::count).sum::<u64>() * PAGE_SIZE,
        };
        let mut progress = |totals: &Totals| {
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
        let wake = self.wake.clone();
        let Some(Link {
            control: messages,
            data: Some(data),
        }) = &self.link
        else {
            return Err(Trouble::from_stop(Stop::Lost(not_open()), "sending memory"));
        };
        let patience = Patience {
            wake: Some(&wake),
            // While memory travels the destination says nothing, unless it gives up.
            alarm: Some(messages.as_fd()),
            limit: Limit::Idle(self.options.peer_timeout),
            doing: "sending memory",
        };
        let round = Round::new(number, &ram, data, patience, &mut progress);
        let result = match (number, guest) {
            (1, Guest::Runs) => round.send_all(&mut *self.machine),
            (_, Guest::Runs) => round.send_dirty(&dirty, Some(&mut *self.machine)),
            (_, Guest::StandsStill) => round.send_dirty(&dirty, None),
        };
        let totals = result.map_err(|trouble| self.last_words(trouble))?;
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

    fn last_words(&self, trouble: Trouble) -> Trouble {
        match &self.link {
            Some(link) => link.last_words(trouble),
            None => trouble,
        }
    }
}
