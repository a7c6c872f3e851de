//! Fills memory, and looks whether it keeps what was written, for as long as it runs.
//!
//! ```text
//!   fill MEBIBYTES STATUS   each page carries its number, a generation, and what both make together; round by round all pages are looked
//!                           at, and every 64th gets a new generation
//! ```
//!
//! Says `fill: N pages` when all are filled; replaces STATUS after every round with `fill-ok N rounds`, and ends only by a signal, or with
//! `FILL-BAD why`.

use std::hint::black_box;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// Words of a page.
const WORDS: usize = 512;
/// A round changes one page of so many.
const CHANGED: usize = 64;
/// Between two rounds.
const REST: Duration = Duration::from_millis(300);

type Page = [u64; WORDS];

/// What a page's first, second and last word are.
fn words(number: usize, generation: u64) -> [u64; 3] {
    let number = number as u64 + 1;
    let both = (number << 32 ^ generation).wrapping_mul(0x5851_f42d_4c95_7f2d);
    [number, generation, both]
}

fn write(page: &mut Page, number: usize, generation: u64) {
    let [first, second, last] = words(number, generation);
    (page[0], page[1], page[WORDS - 1]) = (first, second, last);
}

fn check(page: &Page, number: usize, generation: u64) -> Result<(), String> {
    let found = [page[0], page[1], page[WORDS - 1]];
    let expected = words(number, generation);
    if found == expected {
        return Ok(());
    }
    Err(format!(
        "page {number} holds {found:x?} instead of {expected:x?}"
    ))
}

fn run(mebibytes: usize, status: &Path) -> Result<(), String> {
    let count = mebibytes * 256;
    let mut pages: Vec<Page> = vec![[0; WORDS]; count];
    let mut generations = vec![0; count];
    for (number, page) in pages.iter_mut().enumerate() {
        write(page, number, 0);
    }
    println!("fill: {count} pages");
    for round in 1u64.. {
        // What the memory holds is not for the compiler to know.
        let pages = black_box(&mut pages);
        for (number, page) in pages.iter_mut().enumerate() {
            let generation = &mut generations[number];
            check(page, number, *generation)?;
            if number % CHANGED == round as usize % CHANGED {
                *generation = round;
                write(page, number, round);
            }
        }
        probes::replace(status, &format!("fill-ok {round} rounds\n"))
            .map_err(|error| format!("status: {error}"))?;
        std::thread::sleep(REST);
    }
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (mebibytes, status) = match &args[..] {
        [mebibytes, status] => (mebibytes.parse(), Path::new(status)),
        _ => {
            eprintln!("usage: fill MEBIBYTES STATUS");
            return ExitCode::from(2);
        }
    };
    let Ok(mebibytes) = mebibytes else {
        eprintln!("usage: fill MEBIBYTES STATUS");
        return ExitCode::from(2);
    };
    match run(mebibytes, status) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("FILL-BAD {why}");
            ExitCode::FAILURE
        }
    }
}
