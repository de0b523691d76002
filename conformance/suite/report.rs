//! What is told of a run: each failure as soon as it is seen; at the end the requirements, what
//! could not be checked, and the count.

use crate::script::Script;
use crate::theatre::Outcome;
use std::collections::BTreeMap;

/// What conformance/README.md, "Requirements", numbers R1 to R18.
const REQUIREMENTS: std::ops::RangeInclusive<u32> = 1..=18;
/// Why a transcript was not played in all ways.
const ONLY_AS_WRITTEN: &str = "passed as written; there was no time to cut and join its lines";

#[derive(Default)]
pub struct Report {
    /// What passes is told too.
    is_verbose: bool,
    passed: usize,
    failed: usize,
    /// The transcripts that passed and failed, by requirement.
    judged: BTreeMap<u32, (usize, Vec<String>)>,
    skipped: usize,
    /// The transcripts that were not played, or not in all ways, by the reason.
    unplayed: BTreeMap<&'static str, Vec<String>>,
}

impl Report {
    pub fn new(is_verbose: bool) -> Report {
        Report { is_verbose, ..Report::default() }
    }

    pub fn has_failures(&self) -> bool {
        self.failed > 0
    }

    /// Some transcript was not played for this reason.
    pub fn has_skipped(&self, why: &str) -> bool {
        self.unplayed.contains_key(why)
    }

    /// What came of a transcript.
    pub fn count(&mut self, script: &Script, outcome: Outcome) {
        let Script { name, requirement, claim, .. } = script;
        let what = format!("R{requirement} {name}: {claim}");
        let why = match &outcome {
            Outcome::PassedAsWritten => Some(ONLY_AS_WRITTEN),
            Outcome::Skipped(why) => Some(*why),
            _ => None,
        };
        if let Some(why) = why {
            self.unplayed.entry(why).or_default().push(name.clone());
        }
        match outcome {
            Outcome::Passed | Outcome::PassedAsWritten => {
                self.judged.entry(*requirement).or_default().0 += 1;
                self.check(true, &what);
            }
            Outcome::Failed(why) => {
                self.judged.entry(*requirement).or_default().1.push(name.clone());
                self.check(false, &format!("{what}\n{why}"));
            }
            Outcome::Skipped(_) => self.skipped += 1,
        }
    }

    /// What came of anything else.
    pub fn check(&mut self, passed: bool, what: &str) {
        match passed {
            true => self.passed += 1,
            false => self.failed += 1,
        }
        match passed {
            true if self.is_verbose => print_line!("ok      {what}"),
            true => {}
            false => print_line!("FAILED  {what}"),
        }
    }

    /// conformance/README.md must name each transcript in the row of its requirement, and each
    /// requirement must have one.
    pub fn check_the_table(&mut self, scripts: &[Script], readme: &str) {
        for requirement in REQUIREMENTS {
            let row = format!("| R{requirement} |");
            let row = readme.lines().find(|line| line.starts_with(&row)).unwrap_or_default();
            let mut mine = scripts
                .iter()
                .filter(|script| script.requirement == requirement)
                .filter_map(|script| script.name.strip_suffix(".txt"));
            let unnamed = mine.find(|name| !row.contains(&format!("`{name}`")));
            let what = format!("conformance/README.md names each transcript of R{requirement}");
            match unnamed {
                None => self.check(true, &what),
                Some(name) => self.check(false, &format!("{what}, but not {name}")),
            }
            if !scripts.iter().any(|script| script.requirement == requirement) {
                self.check(false, &format!("R{requirement} has a transcript"));
            }
        }
    }

    pub fn print(&self, is_foreign: bool) {
        print_line!("\nrequirement  transcripts");
        for requirement in REQUIREMENTS {
            let none = (0, Vec::new());
            let (passed, failed) = self.judged.get(&requirement).unwrap_or(&none);
            let failed = match failed.as_slice() {
                [] => String::new(),
                failed => format!(", {} failed: {}", failed.len(), failed.join(", ")),
            };
            print_line!("R{requirement:<11} {passed} passed{failed}");
        }
        if is_foreign || self.is_verbose {
            self.print_unplayed();
        }
        if is_foreign {
            print_line!("  and what no client sees: a peer that vanishes, telnet's urgent byte");
        }
        let skipped = match self.skipped {
            0 => String::new(),
            skipped => format!(", {skipped} skipped"),
        };
        print_line!("\n{} passed, {} failed{skipped}", self.passed, self.failed);
    }

    fn print_unplayed(&self) {
        if !self.unplayed.is_empty() {
            print_line!("\nNot checked:");
        }
        for (why, names) in &self.unplayed {
            match names.as_slice() {
                [name] => print_line!("  {name} {why}"),
                [first, ..] => {
                    print_line!("  {} transcripts, {first} the first: {why}", names.len())
                }
                [] => {}
            }
        }
    }
}
