//! Machines without a hypervisor: real guest memory, a thread that writes it, and failures on demand.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use memory::{Backing, GuestRam, PAGE_SIZE, PageBitmap, RamRange};
use migration::{
    DestinationMachine, DeviceState, MachineError, MachineState, Manifest, MoveControl, Refusal,
    RefusalKind, RunState, SourceMachine,
};

/// What a machine is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Manifest,
    Track,
    Fetch,
    Rearm,
    Pause,
    Save,
    Reserve,
    Restore,
    Resume,
}

/// What happens in the first such call besides its work.
#[derive(Clone)]
pub(crate) enum Trap {
    /// It fails.
    Fail(Call),
    /// Its own side is cancelled.
    Cancel(Call, Arc<MoveControl>),
}

fn spring(trap: &mut Option<Trap>, call: Call) -> Result<(), MachineError> {
    match trap {
        Some(Trap::Fail(at)) if *at == call => {
            *trap = None;
            Err(format!("{call:?} was told to fail").into())
        }
        Some(Trap::Cancel(at, control)) if *at == call => {
            assert!(control.cancel(), "the cancel came too late in {call:?}");
            *trap = None;
            Ok(())
        }
        _ => Ok(()),
    }
}

pub(crate) fn ranges() -> Vec<RamRange> {
    vec![
        RamRange {
            gpa: 0,
            len: 40 << 20,
        },
        RamRange {
            gpa: 1 << 32,
            len: (3 << 20) + PAGE_SIZE,
        },
    ]
}

pub(crate) fn ram() -> Arc<GuestRam> {
    Arc::new(GuestRam::new(&ranges(), Backing::Anonymous { thp: false }).expect("a little memory"))
}

/// The contents of all pages.
pub(crate) fn contents(ram: &GuestRam) -> Vec<u8> {
    let mut all = Vec::new();
    for (index, region) in ram.regions().iter().enumerate() {
        let at = all.len();
        all.resize(at + region.len() as usize, 0);
        let pages = ram.pages(index, 0, region.pages()).expect("in range");
        pages.read_into(&mut all[at..]);
    }
    all
}

struct Guest {
    ram: Arc<GuestRam>,
    dirty: Mutex<Vec<PageBitmap>>,
    tracking: AtomicBool,
    /// Held by the guest while it writes.
    running: Mutex<bool>,
    writes: AtomicU64,
    end: AtomicBool,
}

impl Guest {
    fn write(&self, seed: u64) {
        let region = usize::from(seed.is_multiple_of(5));
        let page = (seed >> 8) % self.ram.regions()[region].pages();
        // Some pages become zero again.
        let value = if seed.is_multiple_of(7) {
            0
        } else {
            (seed >> 16) as u8
        };
        let pages = self.ram.pages(region, page, 1).expect("in range");
        pages.write_from(&[value; PAGE_SIZE as usize]);
        if self.tracking.load(Ordering::SeqCst) {
            self.dirty.lock().expect("no panic elsewhere")[region].set(page);
        }
        self.writes.fetch_add(1, Ordering::SeqCst);
    }
}

/// A guest that writes at random, and can be moved away.
pub(crate) struct Source {
    guest: Arc<Guest>,
    writer: Option<JoinHandle<()>>,
    pub(crate) trap: Option<Trap>,
    pub(crate) pauses: u32,
    pub(crate) resumes: u32,
}

impl Source {
    /// A guest with some memory in use. `busy`: it goes on writing.
    pub(crate) fn new(busy: bool) -> Self {
        let ram = ram();
        let guest = Arc::new(Guest {
            dirty: Mutex::new(
                ram.regions()
                    .iter()
                    .map(|region| PageBitmap::new(region.pages()))
                    .collect(),
            ),
            ram,
            tracking: AtomicBool::new(false),
            running: Mutex::new(true),
            writes: AtomicU64::new(0),
            end: AtomicBool::new(false),
        });
        let mut random = 88_172_645_463_325_252_u64;
        let mut next = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        for _ in 0..3000 {
            guest.write(next());
        }
        let own = Arc::clone(&guest);
        let writer = busy.then(|| {
            std::thread::spawn(move || {
                while !own.end.load(Ordering::SeqCst) {
                    // Held until the write is done: a pause waits for it.
                    let running = own.running.lock().expect("no panic elsewhere");
                    if *running {
                        own.write(next());
                    }
                    drop(running);
                    std::thread::sleep(std::time::Duration::from_micros(20));
                }
            })
        });
        Self {
            guest,
            writer,
            trap: None,
            pauses: 0,
            resumes: 0,
        }
    }

    pub(crate) fn contents(&self) -> Vec<u8> {
        contents(&self.guest.ram)
    }

    pub(crate) fn runs(&self) -> bool {
        *self.guest.running.lock().expect("no panic elsewhere")
    }

    pub(crate) fn tracks(&self) -> bool {
        self.guest.tracking.load(Ordering::SeqCst)
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.guest.end.store(true, Ordering::SeqCst);
        if let Some(writer) = self.writer.take() {
            writer.join().expect("the guest did not panic");
        }
    }
}

pub(crate) fn state() -> MachineState {
    MachineState {
        run_state: RunState::Running,
        devices: vec![DeviceState {
            id: "device".into(),
            kind: "fake".into(),
            version: 3,
            data: arch::x86_64::state::Bytes(vec![1, 2, 3]),
        }],
        ..MachineState::default()
    }
}

pub(crate) fn manifest() -> Manifest {
    Manifest {
        vcpus: 1,
        config: "{}".into(),
        memory: ranges(),
        ..Manifest::default()
    }
}

impl SourceMachine for Source {
    fn manifest(&mut self) -> Result<Manifest, MachineError> {
        spring(&mut self.trap, Call::Manifest)?;
        Ok(manifest())
    }

    fn ram(&self) -> Arc<GuestRam> {
        Arc::clone(&self.guest.ram)
    }

    fn start_dirty_tracking(&mut self) -> Result<(), MachineError> {
        spring(&mut self.trap, Call::Track)?;
        // As KVM does with "initially all set": only what is re-armed becomes clean.
        for region in self
            .guest
            .dirty
            .lock()
            .expect("no panic elsewhere")
            .iter_mut()
        {
            *region = PageBitmap::full(region.pages());
        }
        self.guest.tracking.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn stop_dirty_tracking(&mut self) {
        self.guest.tracking.store(false, Ordering::SeqCst);
    }

    fn fetch_dirty(&mut self, region: usize, into: &mut PageBitmap) -> Result<(), MachineError> {
        spring(&mut self.trap, Call::Fetch)?;
        let dirty = self.guest.dirty.lock().expect("no panic elsewhere");
        into.or_words(dirty[region].words());
        Ok(())
    }

    fn rearm(&mut self, region: usize, first_page: u64, words: &[u64]) -> Result<(), MachineError> {
        spring(&mut self.trap, Call::Rearm)?;
        assert!(first_page.is_multiple_of(64), "{first_page}");
        let mut dirty = self.guest.dirty.lock().expect("no panic elsewhere");
        let first = (first_page / 64) as usize;
        for (word, clear) in dirty[region].words_mut()[first..].iter_mut().zip(words) {
            *word &= !clear;
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.pauses += 1;
        *self.guest.running.lock().expect("no panic elsewhere") = false;
        spring(&mut self.trap, Call::Pause)
    }

    fn save_state(&mut self) -> Result<MachineState, MachineError> {
        spring(&mut self.trap, Call::Save)?;
        Ok(state())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        spring(&mut self.trap, Call::Resume)?;
        self.resumes += 1;
        *self.guest.running.lock().expect("no panic elsewhere") = true;
        Ok(())
    }
}

/// A place for a guest.
#[derive(Default)]
pub(crate) struct Destination {
    pub(crate) trap: Option<Trap>,
    pub(crate) ram: Option<Arc<GuestRam>>,
    pub(crate) restored: Option<MachineState>,
    pub(crate) runs: bool,
    pub(crate) discarded: bool,
}

impl Destination {
    pub(crate) fn with(trap: Trap) -> Self {
        Self {
            trap: Some(trap),
            ..Self::default()
        }
    }
}

impl DestinationMachine for Destination {
    fn reserve(&mut self, manifest: &Manifest) -> Result<Arc<GuestRam>, Vec<Refusal>> {
        spring(&mut self.trap, Call::Reserve).map_err(|error| {
            vec![
                Refusal::new(RefusalKind::Cpu, "no AVX"),
                Refusal::new(RefusalKind::Memory, error.to_string()),
            ]
        })?;
        let ram = GuestRam::new(&manifest.memory, Backing::Anonymous { thp: false })
            .map_err(|error| vec![Refusal::new(RefusalKind::Memory, error.to_string())])?;
        // What a builder leaves behind must not survive.
        let junk = ram.pages(0, 5, 1).expect("in range");
        junk.write_from(&[0xee; PAGE_SIZE as usize]);
        let ram = Arc::new(ram);
        self.ram = Some(Arc::clone(&ram));
        Ok(ram)
    }

    fn restore(&mut self, state: MachineState) -> Result<(), MachineError> {
        spring(&mut self.trap, Call::Restore)?;
        self.restored = Some(state);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        spring(&mut self.trap, Call::Resume)?;
        self.runs = true;
        Ok(())
    }

    fn discard(&mut self) {
        assert!(!self.runs, "a running guest was discarded");
        self.discarded = true;
        if let Some(ram) = self.ram.take() {
            assert_eq!(
                Arc::strong_count(&ram),
                1,
                "somebody still holds the memory"
            );
        }
    }
}
