//! Reads transcripts. `conformance/README.md` describes their language, `steps.rs` has its steps.

use crate::steps::{Needs, Role, Step};
use std::iter::Peekable;

/// People in a room.
const LARGE: usize = 40;
/// Steps.
const LENGTHY: usize = 150;

/// A transcript, ready to be played.
pub struct Script {
    pub name: String,
    pub requirement: u32,
    pub claim: String,
    /// With which this repository's server is started.
    pub options: Vec<String>,
    /// Takes so long that a server is only asked it with SLOW=1.
    pub is_slow: bool,
    /// The suite itself is the server that linechat-client talks to.
    pub plays_server: bool,
    pub steps: Vec<Step>,
}

impl Script {
    /// A file of its own, which begins with `R4 what it claims`.
    pub fn from_file(name: &str, text: &str) -> Result<Script, String> {
        let mut lines = text.lines().zip(1..).map(|(line, number)| (number, line));
        let title = lines.next().map_or("", |(_, title)| title);
        let (requirement, claim) = title
            .split_once(' ')
            .and_then(|(number, claim)| Some((number.strip_prefix('R')?.parse().ok()?, claim)))
            .ok_or(format!("{name}:1: the first line must be like 'R4 what is claimed'"))?;
        Script::parse(name.to_owned(), requirement, claim.to_owned(), lines)
    }

    /// The examples of a document: every block fenced by "```transcript R4". The heading above
    /// is what it claims.
    pub fn from_document(name: &str, text: &str) -> Result<Vec<Script>, String> {
        let mut scripts = Vec::new();
        let mut heading = "";
        let mut lines = text.lines().zip(1..).map(|(line, number)| (number, line));
        while let Some((number, line)) = lines.next() {
            if let Some(text) = line.strip_prefix('#') {
                heading = text.trim_start_matches('#').trim();
            }
            let Some(requirement) = line.strip_prefix("```transcript R") else { continue };
            let requirement =
                requirement.parse().map_err(|_| format!("{name}:{number}: R what?"))?;
            let block: Vec<_> = lines.by_ref().take_while(|(_, line)| *line != "```").collect();
            let name = format!("{name}:{number}");
            scripts.push(Script::parse(name, requirement, heading.to_owned(), block.into_iter())?);
        }
        Ok(scripts)
    }

    fn parse<'a>(
        name: String,
        requirement: u32,
        claim: String,
        lines: impl Iterator<Item = (usize, &'a str)>,
    ) -> Result<Script, String> {
        let is_step = |line: &str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
        let mut lines = lines.filter(|(_, line)| is_step(line)).peekable();
        let mut options = Vec::new();
        while let Some((_, line)) = lines.next_if(|(_, line)| line.starts_with("server --")) {
            options.extend(line.split_whitespace().skip(1).map(str::to_owned));
        }
        let is_slow = lines.next_if(|(_, line)| *line == "slow").is_some();
        let plays_server = lines.next_if(|(_, line)| *line == "the suite is the server").is_some();
        let file = name.split(':').next().unwrap_or_default();
        let steps = parse_steps(&mut lines, 0).map_err(|error| format!("{file}:{error}"))?;
        if !steps.iter().any(asserts) {
            return Err(format!("{name}: asserts nothing"));
        }
        Ok(Script { name, requirement, claim, options, is_slow, plays_server, steps })
    }

    /// Has so many people or so much text that to play it once is enough.
    pub fn is_large(&self) -> bool {
        self.is_crowded() || self.written().iter().any(|step| step.is_long())
    }

    /// Has so many people or steps that others are played first.
    pub fn is_lengthy(&self) -> bool {
        self.is_crowded() || self.unrolled().len() > LENGTHY
    }

    fn is_crowded(&self) -> bool {
        self.written().iter().any(|step| step.who.len() > LARGE)
    }

    /// Takes long and enters no room, so that it disturbs nothing that is played meanwhile.
    pub fn is_apart(&self) -> bool {
        self.is_slow && !self.written().iter().any(|step| step.enters())
    }

    pub fn is_about_our_client(&self) -> bool {
        let is_ours = |needs| matches!(needs, Needs::OurClient | Needs::Terminal);
        self.written().iter().any(|step| is_ours(step.form.needs))
    }

    /// The steps in the order in which they are played, each with the round that it is played in.
    pub fn unrolled(&self) -> Vec<(usize, &Step)> {
        fn unroll<'a>(round: usize, steps: &'a [Step], into: &mut Vec<(usize, &'a Step)>) {
            for step in steps {
                match step.form.role {
                    Role::Repeats => {
                        (1..=step.number).for_each(|round| unroll(round, &step.block, into))
                    }
                    _ => into.push((round, step)),
                }
            }
        }
        let mut steps = Vec::new();
        unroll(0, &self.steps, &mut steps);
        steps
    }

    /// Every step as it is written, those of blocks included.
    pub fn written(&self) -> Vec<&Step> {
        fn collect<'a>(steps: &'a [Step], into: &mut Vec<&'a Step>) {
            for step in steps {
                into.push(step);
                collect(&step.block, into);
            }
        }
        let mut steps = Vec::new();
        collect(&self.steps, &mut steps);
        steps
    }
}

fn asserts(step: &Step) -> bool {
    step.form.role == Role::Asserts || step.block.iter().any(asserts)
}

/// The steps that are indented by `depth`, up to the first that is less.
fn parse_steps<'a>(
    lines: &mut Peekable<impl Iterator<Item = (usize, &'a str)>>,
    depth: usize,
) -> Result<Vec<Step>, String> {
    let indentation = |line: &str| line.len() - line.trim_start_matches(' ').len();
    let mut steps = Vec::new();
    while let Some((number, line)) = lines.next_if(|(_, line)| indentation(line) >= depth) {
        let wrong = |what: String| format!("{number}: {what}: {}", line.trim_start());
        if indentation(line) > depth {
            return Err(wrong("indented, though no block begins before".to_owned()));
        }
        let mut step = Step::parse(number, line.trim_start()).map_err(wrong)?;
        if step.form.role == Role::Repeats {
            let inner = lines.peek().map_or(0, |(_, line)| indentation(line));
            if inner <= depth {
                return Err(wrong("the steps to repeat must be indented".to_owned()));
            }
            step.block = parse_steps(lines, inner)?;
        }
        steps.push(step);
    }
    Ok(steps)
}
