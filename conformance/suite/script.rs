//! Reads transcripts. `conformance/README.md` describes their language.

/// A transcript, ready to be played.
#[derive(Debug)]
pub struct Script {
    pub name: String,
    pub requirement: u32,
    pub claim: String,
    pub options: Vec<String>,
    /// The suite itself is the server that linechat-client talks to.
    pub plays_server: bool,
    pub steps: Vec<Step>,
}

/// One line of a transcript.
#[derive(Debug)]
pub struct Step {
    pub line: usize,
    pub source: String,
    pub action: Action,
}

#[derive(Debug)]
pub enum Action {
    InTheRoom(Vec<String>),
    /// Somebody does something; several do it one after the other.
    Client(Vec<String>, Deed),
    Console(Text),
    Signal(String),
    ServerExits(i32),
    Times(usize, Vec<Step>),
}

#[derive(Debug)]
pub enum Deed {
    Connects,
    /// With these arguments; perhaps at a terminal with so many columns.
    Runs(Option<usize>, Text),
    /// What stands in the terminal's line that is being typed, `|` where the cursor is.
    Shows(Text),
    Resizes(usize),
    ReceivesSignal(String),
    Sends(Text),
    Receives(Text),
    ReceivesBytes(Text),
    ReceivesSometime(Text),
    IsClosed,
    Closes,
    HalfCloses,
    Resets,
    StopsReading,
    Complains(Text),
    Exits(i32),
}

/// Text as it stands in a transcript, understood up to what is known only while it is played.
#[derive(Debug)]
pub struct Text(pub Vec<Part>);

#[derive(Debug)]
pub enum Part {
    Bytes(Vec<u8>),
    /// `*`: any text but none.
    Anything,
    /// `{n}`: how often the block has begun.
    Round,
    /// `{server}`: the server's address.
    Server,
    /// `{ana's address}`: where Ana's connection comes from.
    AddressOf(String),
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
        let mut options = Vec::new();
        let lines = lines.map(|(number, line)| (number, line.trim_start()));
        let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        let mut lines = lines.peekable();
        while let Some((_, line)) = lines.next_if(|(_, line)| line.starts_with("server --")) {
            options.extend(line.split_whitespace().skip(1).map(str::to_owned));
        }
        let plays_server = lines.next_if(|(_, line)| *line == "the suite is the server").is_some();
        let place = name.split(':').next().unwrap_or_default().to_owned();
        let steps = parse_steps(&mut lines, false).map_err(|error| format!("{place}:{error}"))?;
        if !steps.iter().any(|step| step.asserts()) {
            return Err(format!("{name}: asserts nothing"));
        }
        Ok(Script { name, requirement, claim, options, plays_server, steps })
    }

    /// Whether any step does what `test` looks for.
    pub fn has(&self, test: &dyn Fn(&Action) -> bool) -> bool {
        fn any(steps: &[Step], test: &dyn Fn(&Action) -> bool) -> bool {
            steps.iter().any(|step| match &step.action {
                Action::Times(_, steps) => any(steps, test),
                action => test(action),
            })
        }
        any(&self.steps, test)
    }

    pub fn has_deed(&self, test: impl Fn(&Deed) -> bool) -> bool {
        self.has(&|action| matches!(action, Action::Client(_, deed) if test(deed)))
    }
}

impl Step {
    fn asserts(&self) -> bool {
        match &self.action {
            Action::InTheRoom(_) | Action::Signal(_) => false,
            Action::Console(_) | Action::ServerExits(_) => true,
            Action::Times(_, steps) => steps.iter().any(Step::asserts),
            Action::Client(_, deed) => matches!(
                deed,
                Deed::Receives(_)
                    | Deed::ReceivesBytes(_)
                    | Deed::ReceivesSometime(_)
                    | Deed::Shows(_)
                    | Deed::IsClosed
                    | Deed::Complains(_)
                    | Deed::Exits(_)
            ),
        }
    }
}

fn parse_steps<'a>(
    lines: &mut impl Iterator<Item = (usize, &'a str)>,
    in_block: bool,
) -> Result<Vec<Step>, String> {
    let mut steps = Vec::new();
    while let Some((number, line)) = lines.next() {
        let wrong = |what: &str| format!("{number}: {what}: {line}");
        if line == "end" && in_block {
            return Ok(steps);
        }
        let action = if let Some(rounds) = line.strip_suffix(" times") {
            let rounds = rounds.parse().map_err(|_| wrong("how many times?"))?;
            Action::Times(rounds, parse_steps(lines, true)?)
        } else {
            parse_action(line).map_err(|what| wrong(&what))?
        };
        steps.push(Step { line: number, source: line.to_owned(), action });
    }
    match in_block {
        true => Err("the block has no 'end'".to_owned()),
        false => Ok(steps),
    }
}

fn parse_action(line: &str) -> Result<Action, String> {
    if let Some(names) = line.strip_prefix("in the room: ") {
        return Ok(Action::InTheRoom(parse_names(names)?));
    }
    if let Some(pattern) = line.strip_prefix("console < ") {
        return Ok(Action::Console(pattern.parse()?));
    }
    if let Some(signal) = line.strip_prefix("server receives SIG") {
        return Ok(Action::Signal(signal.to_owned()));
    }
    if let Some(status) = line.strip_prefix("server exits ") {
        return Ok(Action::ServerExits(parse_status(status)?));
    }
    // The first of these marks to be found divides who from what.
    let marks = [
        " > ",
        " >> ",
        " < ",
        " << ",
        " sometime < ",
        " ! ",
        " runs at ",
        " runs ",
        " shows ",
        " resizes to ",
        " receives SIG",
        " exits ",
    ];
    let found = marks.iter().filter_map(|mark| Some((line.find(mark)?, *mark)));
    let (who, deed) = match found.min_by_key(|(at, _)| *at) {
        Some((at, mark)) => {
            let (who, text) = (&line[..at], &line[at + mark.len()..]);
            let deed = match mark.trim() {
                ">" => Deed::Sends(format!("{text}\\n").parse()?),
                ">>" => Deed::Sends(text.parse()?),
                "<" if text == "[closed]" => Deed::IsClosed,
                "<" => Deed::Receives(text.parse()?),
                "<<" => Deed::ReceivesBytes(text.parse()?),
                "sometime <" => Deed::ReceivesSometime(text.parse()?),
                "!" => Deed::Complains(text.parse()?),
                "runs at" => {
                    let (columns, arguments) = parse_columns(text)?;
                    Deed::Runs(Some(columns), arguments.parse()?)
                }
                "shows" => Deed::Shows(text.parse()?),
                "resizes to" => Deed::Resizes(parse_columns(text)?.0),
                "receives SIG" => Deed::ReceivesSignal(text.to_owned()),
                "runs" => Deed::Runs(None, text.parse()?),
                _ => Deed::Exits(parse_status(text)?),
            };
            (who, deed)
        }
        None => {
            let (who, deed) = line.split_once(' ').ok_or("not a step")?;
            let deed = match deed {
                "connects" => Deed::Connects,
                "closes" => Deed::Closes,
                "half-closes" => Deed::HalfCloses,
                "resets" => Deed::Resets,
                "stops reading" => Deed::StopsReading,
                _ => return Err("not a step".to_owned()),
            };
            (who, deed)
        }
    };
    Ok(Action::Client(parse_names(who)?, deed))
}

/// `40 columns` and what stands behind.
fn parse_columns(text: &str) -> Result<(usize, &str), String> {
    let (columns, rest) = text.split_once(" columns").ok_or("how many columns?")?;
    let columns = columns.parse().map_err(|_| "how many columns?".to_owned())?;
    Ok((columns, rest.trim_start()))
}

fn parse_status(text: &str) -> Result<i32, String> {
    text.parse().map_err(|_| "an exit status is a number".to_owned())
}

/// Names with spaces between; `p1..p20` is twenty of them.
fn parse_names(text: &str) -> Result<Vec<String>, String> {
    let range = |word: &str| {
        let (first, last) = word.split_once("..")?;
        let stem = first.trim_end_matches(|c: char| c.is_ascii_digit());
        let (from, to) = (first.strip_prefix(stem)?, last.strip_prefix(stem)?);
        let (from, to): (u32, u32) = (from.parse().ok()?, to.parse().ok()?);
        Some((from..=to).map(|number| format!("{stem}{number}")).collect())
    };
    let names = text.split_whitespace().map(|word| {
        let word = String::from_utf8(word.parse::<Text>()?.plain()?);
        let word = word.map_err(|_| "a name is UTF-8".to_owned())?;
        Ok(range(&word).unwrap_or(vec![word]))
    });
    Ok(names.collect::<Result<Vec<_>, String>>()?.concat())
}

impl Text {
    /// The bytes, if all of them are known beforehand.
    fn plain(self) -> Result<Vec<u8>, String> {
        let parts = self.0.into_iter().map(|part| match part {
            Part::Bytes(bytes) => Ok(bytes),
            _ => Err("only plain text can stand here".to_owned()),
        });
        Ok(parts.collect::<Result<Vec<_>, String>>()?.concat())
    }
}

/// Where the brace is closed that was opened before `text`.
fn closing_brace(text: &str) -> Option<usize> {
    let mut open = 1;
    let mut is_escaped = false;
    text.char_indices().find_map(|(at, character)| {
        match character {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            '{' => open += 1,
            '}' => open -= 1,
            _ => {}
        }
        (open == 0).then_some(at)
    })
}

impl std::str::FromStr for Text {
    type Err = String;

    fn from_str(text: &str) -> Result<Text, String> {
        let mut parts = Vec::new();
        let mut bytes = Vec::new();
        let mut rest = text;
        while let Some(character) = rest.chars().next() {
            rest = &rest[character.len_utf8()..];
            let special = match character {
                '\\' => {
                    bytes.extend(parse_escape(&mut rest)?);
                    None
                }
                '*' => Some(Part::Anything),
                '{' => {
                    let end = closing_brace(rest).ok_or("'{' without '}'")?;
                    let inside = &rest[..end];
                    rest = &rest[end + 1..];
                    match (inside, inside.rsplit_once('*'), inside.strip_suffix("'s address")) {
                        ("n", ..) => Some(Part::Round),
                        ("server", ..) => Some(Part::Server),
                        (.., Some(name)) => Some(Part::AddressOf(name.to_owned())),
                        (_, Some((unit, count)), _) if count.parse::<usize>().is_ok() => {
                            let count = count.parse().unwrap_or_default();
                            bytes.extend(unit.parse::<Text>()?.plain()?.repeat(count));
                            None
                        }
                        _ => {
                            bytes.extend(parse_names(inside)?.join(" ").into_bytes());
                            None
                        }
                    }
                }
                _ => {
                    bytes.extend(character.to_string().into_bytes());
                    None
                }
            };
            if let Some(special) = special {
                parts.push(Part::Bytes(std::mem::take(&mut bytes)));
                parts.push(special);
            }
        }
        parts.push(Part::Bytes(bytes));
        Ok(Text(parts))
    }
}

/// What stands behind a backslash: `r`, `n`, `t`, `s` for a space, `xFF`, `u202E`, or a character
/// that would otherwise be special.
fn parse_escape(rest: &mut &str) -> Result<Vec<u8>, String> {
    let character = rest.chars().next().ok_or("a backslash at the end")?;
    *rest = &rest[character.len_utf8()..];
    let mut digits = |count: usize| {
        let digits = rest.get(..count).ok_or("too few digits")?;
        *rest = &rest[count..];
        u32::from_str_radix(digits, 16).map_err(|_| format!("not hexadecimal: {digits}"))
    };
    Ok(match character {
        'r' => vec![b'\r'],
        'n' => vec![b'\n'],
        't' => vec![b'\t'],
        's' => vec![b' '],
        'x' => vec![digits(2)? as u8],
        'u' => char::from_u32(digits(4)?).ok_or("no such character")?.to_string().into_bytes(),
        '\\' | '*' | '{' | '}' => vec![character as u8],
        _ => return Err(format!("unknown escape \\{character}")),
    })
}
