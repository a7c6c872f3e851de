//! Which descriptors are ours, and what is behind them.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use mshv_bindings::{MSHV_VP_MMAP_OFFSET_COUNT, mshv_run_vp};

use crate::hypercall;
use crate::memory::PAGE;
use crate::partition::{Host, Partition, requests};
use crate::state_pages;
use crate::sys::{self, Answer, note};
use crate::vp::{Vp, lock};

/// What a descriptor stands for.
#[derive(Clone, Debug)]
pub(crate) enum Object {
    /// `/dev/mshv`.
    Device(Arc<Host>),
    /// What MSHV_CREATE_PARTITION returned.
    Partition(Arc<Partition>),
    /// What MSHV_CREATE_VP returned; it keeps its partition.
    Vp(Arc<Partition>, Arc<Vp>),
}

static OBJECTS: Mutex<BTreeMap<c_int, Object>> = Mutex::new(BTreeMap::new());

/// Descriptors that can be ours are below this; their bits spare all others the lock.
const MOST: usize = 1 << 16;
static BITS: [AtomicU64; MOST / 64] = [const { AtomicU64::new(0) }; MOST / 64];

/// Whether a descriptor is ours. Takes no lock and allocates nothing: every `mmap` of the process comes by.
pub(crate) fn is_ours(fd: c_int) -> bool {
    usize::try_from(fd)
        .ok()
        .and_then(|fd| {
            BITS.get(fd / 64)
                .map(|word| word.load(Ordering::Acquire) >> (fd % 64) & 1 != 0)
        })
        .unwrap_or(false)
}

/// The object behind a descriptor.
pub(crate) fn find(fd: c_int) -> Option<Object> {
    if !is_ours(fd) {
        return None;
    }
    lock(&OBJECTS).get(&fd).cloned()
}

/// Forgets a descriptor. The caller drops the object, outside the lock: with the last one KVM's descriptors go.
pub(crate) fn remove(fd: c_int) -> Option<Object> {
    if !is_ours(fd) {
        return None;
    }
    let mut objects = OBJECTS.lock().unwrap_or_else(PoisonError::into_inner);
    BITS[fd as usize / 64].fetch_and(!(1 << (fd % 64)), Ordering::AcqRel);
    objects.remove(&fd)
}

/// Makes a descriptor for an object.
fn insert(name: &std::ffi::CStr, close_on_exec: bool, object: Object) -> Answer {
    let fd = sys::placeholder(name, close_on_exec)?;
    let Some(word) = BITS.get(fd as usize / 64) else {
        let _ = sys::close(fd);
        return Err(libc::EMFILE);
    };
    // A stale entry is possible if the client closed a descriptor behind our back (dup2, close_range).
    let stale = lock(&OBJECTS).insert(fd, object);
    word.fetch_or(1 << (fd % 64), Ordering::AcqRel);
    drop(stale);
    Ok(fd)
}

/// Whether the real device is there; then the double keeps out of the way.
pub(crate) fn device_exists() -> bool {
    static EXISTS: OnceLock<bool> = OnceLock::new();
    // SAFETY: the path is a C string; O_PATH opens nothing of the device itself.
    *EXISTS.get_or_init(|| unsafe {
        match sys::openat(
            libc::AT_FDCWD,
            c"/dev/mshv".as_ptr(),
            libc::O_PATH | libc::O_CLOEXEC,
            0,
        ) {
            Ok(fd) => sys::close(fd).is_ok(),
            Err(error) => error != libc::ENOENT,
        }
    })
}

/// `open("/dev/mshv")`.
pub(crate) fn open(flags: c_int) -> Answer {
    let host = Host::open()
        .inspect_err(|error| eprintln!("mshv-double: /dev/kvm cannot be used: errno {error}"))?;
    insert(
        c"mshv",
        flags & libc::O_CLOEXEC != 0,
        Object::Device(Arc::new(host)),
    )
}

/// `mmap` of one of our descriptors. The register and message pages of a VP are not offered, which the driver tells with
/// ENODEV (`mshv_vp_mmap`); the other descriptors cannot be mapped at all.
pub(crate) fn map<T>(fd: c_int, offset: i64) -> Answer<T> {
    match find(fd) {
        Some(Object::Vp(..)) if offset as u64 / PAGE >= u64::from(MSHV_VP_MMAP_OFFSET_COUNT) => {
            note!("mmap of a VP: offset {offset:#x}");
            Err(libc::EINVAL)
        }
        _ => Err(libc::ENODEV),
    }
}

impl Object {
    /// An ioctl of the driver's type.
    ///
    /// # Safety
    ///
    /// `argument` is what the request demands.
    pub(crate) unsafe fn ioctl(&self, request: u64, argument: u64) -> Answer {
        // SAFETY: vouched for by the caller.
        unsafe {
            match (self, request) {
                (Object::Device(_), requests::CREATE_PARTITION) => {
                    let partition = Arc::new(Partition::create(argument)?);
                    insert(c"mshv_partition", true, Object::Partition(partition))
                }
                (Object::Device(host), requests::ROOT_HVCALL) => {
                    hypercall::of_host(host, argument).map(|()| 0)
                }
                (Object::Partition(partition), requests::CREATE_VP) => {
                    let vp = partition.create_vp(argument)?;
                    insert(c"mshv_vp", true, Object::Vp(Arc::clone(partition), vp))
                }
                (Object::Partition(partition), _) => partition.ioctl(request, argument),
                (Object::Vp(partition, vp), _) => vp_ioctl(partition, vp, request, argument),
                (Object::Device(_), _) => {
                    note!("/dev/mshv: unknown ioctl {request:#x}");
                    Err(libc::ENOTTY)
                }
            }
        }
    }
}

/// # Safety
///
/// `argument` is what the request demands.
unsafe fn vp_ioctl(partition: &Partition, vp: &Vp, request: u64, argument: u64) -> Answer {
    let _held = lock(&vp.ioctl);
    // SAFETY: vouched for by the caller.
    unsafe {
        match request {
            requests::RUN_VP => {
                let message = vp.run(partition)?;
                const { assert!(size_of::<mshv_bindings::hv_message>() <= size_of::<mshv_run_vp>()) };
                sys::copy_to(argument, &message)?;
            }
            requests::GET_VP_STATE => state_pages::transfer(partition, vp, argument, false)?,
            requests::SET_VP_STATE => state_pages::transfer(partition, vp, argument, true)?,
            requests::ROOT_HVCALL => hypercall::of_partition(partition, false, argument)?,
            _ => {
                note!("VP {}: unknown ioctl {request:#x}", vp.index);
                return Err(libc::ENOTTY);
            }
        }
    }
    Ok(0)
}
