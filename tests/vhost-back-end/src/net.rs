//! A network on which every address answers: ARP requests, and ICMP echo requests.

use std::collections::VecDeque;
use std::io::Result;

use crate::memory::Memory;
use crate::ring::Request;

/// `virtio_net_hdr_v1`.
const HEADER: usize = 12;
/// The station that has all addresses.
const STATION: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0xee];
/// Most frames that wait for room.
const MOST: usize = 256;

/// What waits to be received.
#[derive(Default)]
pub(crate) struct Net {
    waiting: VecDeque<Vec<u8>>,
}

impl Net {
    /// A frame of the guest.
    pub(crate) fn sent(&mut self, memory: &Memory, request: &Request) -> Result<()> {
        let mut packet = Vec::new();
        for &(gpa, len, _) in &request.parts {
            let at = packet.len();
            packet.resize(at + len as usize, 0);
            memory.read(gpa, &mut packet[at..])?;
        }
        if let Some(answer) = packet.get(HEADER..).and_then(answer)
            && self.waiting.len() < MOST
        {
            let mut packet = vec![0; HEADER];
            // One buffer.
            packet[10] = 1;
            packet.extend(answer);
            self.waiting.push_back(packet);
        }
        Ok(())
    }

    pub(crate) fn has_frames(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Fills a buffer of the guest; how many bytes were written.
    pub(crate) fn receive(&mut self, memory: &Memory, request: &Request) -> Result<u32> {
        let packet = self.waiting.pop_front().unwrap_or_default();
        let mut done = 0;
        for &(gpa, len, _) in &request.parts {
            let end = (done + len as usize).min(packet.len());
            memory.write(gpa, &packet[done..end])?;
            done = end;
        }
        Ok(done as u32)
    }
}

/// What is answered to a frame.
fn answer(frame: &[u8]) -> Option<Vec<u8>> {
    let mut answer = frame.to_vec();
    answer.get_mut(..6)?.copy_from_slice(&frame[6..12]);
    answer.get_mut(6..12)?.copy_from_slice(&STATION);
    match *frame.get(12..14)? {
        // ARP, a request: the target becomes the sender.
        [8, 6] if frame.get(20..22)? == [0, 1] && frame.len() >= 42 => {
            answer[21] = 2;
            answer[22..28].copy_from_slice(&STATION);
            answer[28..32].copy_from_slice(&frame[38..42]);
            answer[32..42].copy_from_slice(&frame[22..32]);
            Some(answer)
        }
        // IPv4 without options, ICMP, an echo request.
        [8, 0] if frame.get(14)? == &0x45 && frame.get(23)? == &1 && frame.get(34)? == &8 => {
            answer[26..30].copy_from_slice(&frame[30..34]);
            answer[30..34].copy_from_slice(&frame[26..30]);
            answer[34] = 0;
            // The sum goes up by what the type went down (RFC 1624).
            let sum = u16::from_be_bytes([frame[36], frame[37]]);
            let (mut new, carry) = sum.overflowing_add(0x0800);
            new += u16::from(carry);
            answer[36..38].copy_from_slice(&new.to_be_bytes());
            Some(answer)
        }
        _ => None,
    }
}
