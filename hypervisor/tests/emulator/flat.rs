//! A platform over a few pages of plain memory, where linear addresses are physical ones.

use hypervisor::emulator::{
    Access, AccessKind, Exception, Platform, PlatformError, TranslateFailure, VectorRegisters,
    XsaveComponent,
};

/// What may be done with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Page {
    Absent,
    ReadOnly,
    ReadWrite,
}

/// One access that reached the platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    CompareExchange(u64, usize),
    PioRead(u16, usize),
    PioWrite(u16, Vec<u8>),
}

/// Where an XSAVE area has XMM registers and upper halves (offset and bytes).
const XMM: usize = 160;
const AVX: (usize, usize) = (576, 256);

/// The platform. Addresses outside `base .. base + 4096 * pages.len()` count as accesses outside.
pub(crate) struct Flat {
    pub(crate) base: u64,
    pub(crate) pages: Vec<Page>,
    pub(crate) memory: Vec<u8>,
    pub(crate) vectors: VectorRegisters,
    pub(crate) xcr0: u64,
    /// An address outside the window was asked for.
    pub(crate) outside: bool,
    /// The accesses, if they are to be kept.
    pub(crate) log: Option<Vec<Seen>>,
    /// MXCSR_MASK, if the extended state is offered: x87 in its initial state, SSE and AVX from `vectors`.
    pub(crate) mxcsr_mask: Option<u32>,
    /// Low byte of the x87 status word.
    pub(crate) x87_status: u8,
    /// What the ports answer, repeated.
    pub(crate) port_value: u32,
}

impl Flat {
    pub(crate) fn new(base: u64, pages: &[Page]) -> Self {
        Self {
            base,
            pages: pages.to_vec(),
            memory: vec![0; pages.len() * 4096],
            vectors: VectorRegisters {
                upper: Some([0; 16]),
                mxcsr: 0x1f80,
                ..VectorRegisters::default()
            },
            xcr0: 7,
            outside: false,
            log: None,
            mxcsr_mask: None,
            x87_status: 0,
            port_value: 0x8765_4321,
        }
    }

    fn slice(&mut self, gpa: u64, bytes: usize) -> Result<&mut [u8], PlatformError> {
        assert!(
            gpa % 4096 + bytes as u64 <= 4096,
            "an access crosses a page"
        );
        let offset = gpa.wrapping_sub(self.base) as usize;
        self.memory
            .get_mut(offset..offset.saturating_add(bytes))
            .ok_or_else(|| "no such memory".into())
    }

    fn note(&mut self, seen: impl FnOnce() -> Seen) {
        if let Some(log) = &mut self.log {
            log.push(seen());
        }
    }
}

impl Platform for Flat {
    fn translate(&mut self, gva: u64, access: Access) -> Result<u64, TranslateFailure> {
        let index = gva.wrapping_sub(self.base) / 4096;
        let page = self.pages.get(index as usize).copied();
        self.outside |= page.is_none();
        let page = page.unwrap_or(Page::Absent);
        let write = access.kind == AccessKind::Write;
        let allowed = match page {
            Page::Absent => false,
            Page::ReadOnly => !write,
            Page::ReadWrite => true,
        };
        if allowed {
            return Ok(gva);
        }
        let mut code = u32::from(page != Page::Absent);
        if write {
            code |= 2;
        }
        if access.user {
            code |= 4;
        }
        Err(TranslateFailure::Exception(Exception::page_fault(
            code, gva,
        )))
    }

    fn read(&mut self, gpa: u64, data: &mut [u8]) -> Result<(), PlatformError> {
        let bytes = data.len();
        self.note(|| Seen::Read(gpa, bytes));
        data.copy_from_slice(self.slice(gpa, bytes)?);
        Ok(())
    }

    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), PlatformError> {
        self.note(|| Seen::Write(gpa, data.to_vec()));
        self.slice(gpa, data.len())?.copy_from_slice(data);
        Ok(())
    }

    fn compare_exchange(
        &mut self,
        gpa: u64,
        expected: &[u8],
        new: &[u8],
    ) -> Result<bool, PlatformError> {
        self.note(|| Seen::CompareExchange(gpa, new.len()));
        let memory = self.slice(gpa, new.len())?;
        if memory != expected {
            return Ok(false);
        }
        memory.copy_from_slice(new);
        Ok(true)
    }

    fn pio_read(&mut self, port: u16, data: &mut [u8]) -> Result<(), PlatformError> {
        let bytes = data.len();
        self.note(|| Seen::PioRead(port, bytes));
        data.copy_from_slice(&self.port_value.to_le_bytes()[..bytes]);
        Ok(())
    }

    fn pio_write(&mut self, port: u16, data: &[u8]) -> Result<(), PlatformError> {
        self.note(|| Seen::PioWrite(port, data.to_vec()));
        Ok(())
    }

    fn vectors(&mut self) -> Result<VectorRegisters, PlatformError> {
        Ok(self.vectors.clone())
    }

    fn set_vectors(&mut self, vectors: &VectorRegisters) -> Result<(), PlatformError> {
        self.vectors = vectors.clone();
        self.vectors.zero_above = 0;
        Ok(())
    }

    fn xcr0(&mut self) -> Result<u64, PlatformError> {
        Ok(self.xcr0)
    }

    fn xsave_area(&mut self) -> Result<Option<Vec<u8>>, PlatformError> {
        let Some(mask) = self.mxcsr_mask else {
            return Ok(None);
        };
        let mut area = vec![0; AVX.0 + 256];
        area[2] = self.x87_status;
        area[24..28].copy_from_slice(&self.vectors.mxcsr.to_le_bytes());
        area[28..32].copy_from_slice(&mask.to_le_bytes());
        let upper = self.vectors.upper.unwrap_or_default();
        for (index, (xmm, upper)) in self.vectors.xmm.iter().zip(upper).enumerate() {
            let (low, high) = (XMM + 16 * index, AVX.0 + 16 * index);
            area[low..low + 16].copy_from_slice(&xmm.to_le_bytes());
            area[high..high + 16].copy_from_slice(&upper.to_le_bytes());
        }
        let sse = self.vectors.xmm.iter().any(|xmm| *xmm != 0);
        let avx = upper.iter().any(|upper| *upper != 0);
        area[512] = u8::from(sse) << 1 | u8::from(avx) << 2;
        Ok(Some(area))
    }

    fn set_xsave_area(&mut self, area: &[u8]) -> Result<(), PlatformError> {
        let lane = |at: usize| u128::from_le_bytes(area[at..at + 16].try_into().expect("16 bytes"));
        self.vectors.mxcsr = u32::from_le_bytes(area[24..28].try_into().expect("4 bytes"));
        let in_use = |bit: u8| area[512] >> bit & 1 != 0;
        for index in 0..16 {
            let (low, high) = (lane(XMM + 16 * index), lane(AVX.0 + 16 * index));
            self.vectors.xmm[index] = if in_use(1) { low } else { 0 };
            if let Some(upper) = &mut self.vectors.upper {
                upper[index] = if in_use(2) { high } else { 0 };
            }
        }
        Ok(())
    }

    fn xsave_component(&mut self, index: u32) -> Option<XsaveComponent> {
        (index == 2).then_some(XsaveComponent {
            offset: AVX.0 as u32,
            bytes: AVX.1 as u32,
            aligned: false,
        })
    }
}
