//! What the suites said: counts read from the lines of libtest and of libtest-mimic.
//!
//! Both print `test NAME ... ignored` with a reason (`, reason` or ` (reason)`), and a summary
//! `test result: ok. 3 passed; 0 failed; 1 ignored; …` for each test binary.

/// Tests counted so far, with the reason of every skip.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Tests that passed.
    pub(crate) passed: u64,
    /// Tests that failed.
    pub(crate) failed: u64,
    /// Tests that did not run.
    pub(crate) skipped: u64,
    /// One `NAME: reason` line for each failure or skip that has a name.
    pub(crate) notes: Vec<String>,
}

impl Tally {
    /// Counts a check that passed.
    pub(crate) fn pass(&mut self, name: &str) {
        println!("test {name} ... ok");
        self.passed += 1;
    }

    /// Counts a check that failed.
    pub(crate) fn fail(&mut self, name: &str, reason: &str) {
        println!("test {name} ... FAILED: {reason}");
        self.failed += 1;
        self.notes.push(format!("failed   {name}: {reason}"));
    }

    /// Counts a check that cannot run here.
    pub(crate) fn skip(&mut self, name: &str, reason: &str) {
        println!("test {name} ... ignored, {reason}");
        self.skipped += 1;
        self.notes.push(format!("skipped  {name}: {reason}"));
    }

    /// Tests that ran or were skipped.
    pub(crate) fn total(&self) -> u64 {
        self.passed + self.failed + self.skipped
    }

    /// Takes in another tally.
    pub(crate) fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.notes.extend(other.notes);
    }

    /// Reads one line of a suite's output.
    pub(crate) fn read_line(&mut self, line: &str) {
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.read_result(counts);
        } else if let Some((name, outcome)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ... "))
        {
            let outcome = outcome.trim();
            if let Some(reason) = outcome.strip_prefix("ignored") {
                let reason = reason.trim_start_matches(',').trim();
                let reason = reason
                    .strip_prefix('(')
                    .and_then(|r| r.strip_suffix(')'))
                    .unwrap_or(reason);
                let reason = if reason.is_empty() {
                    "no reason given"
                } else {
                    reason
                };
                self.notes
                    .push(format!("skipped  {}: {reason}", name.trim()));
            } else if outcome.starts_with("FAILED") {
                self.notes.push(format!("failed   {}", name.trim()));
            }
        }
    }

    fn read_result(&mut self, counts: &str) {
        for part in counts.split([';', '.']) {
            let mut words = part.split_whitespace();
            let (Some(number), Some(word)) = (words.next(), words.next()) else {
                continue;
            };
            let Ok(number) = number.parse::<u64>() else {
                continue;
            };
            match word {
                "passed" | "measured" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.skipped += number,
                _ => {}
            }
        }
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Tally {
        let mut tally = Tally::default();
        text.lines().for_each(|line| tally.read_line(line));
        tally
    }

    #[test]
    fn sums_the_results_of_several_binaries() {
        let tally = read(
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.01s\n\
             test result: FAILED. 2 passed; 4 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s",
        );
        assert_eq!((tally.passed, tally.failed, tally.skipped), (5, 4, 1));
        assert_eq!(tally.to_string(), "5 passed, 4 failed, 1 skipped");
    }

    #[test]
    fn keeps_the_reason_of_a_skip_in_both_spellings() {
        let tally = read(
            "test a::b ... ignored, no hugetlbfs here\ntest move/6.1   ... ignored (no /dev/kvm)\ntest c ... ignored",
        );
        assert_eq!(
            tally.notes,
            [
                "skipped  a::b: no hugetlbfs here",
                "skipped  move/6.1: no /dev/kvm",
                "skipped  c: no reason given"
            ]
        );
    }

    #[test]
    fn names_what_failed_and_ignores_other_lines() {
        let tally = read("running 2 tests\ntest x ... ok\ntest y ... FAILED\nerror: test failed");
        assert_eq!(tally.notes, ["failed   y"]);
        assert_eq!(tally.total(), 0);
    }
}
