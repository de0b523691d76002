//! The steps of transcripts as plain data: one table says how each is written, what it does, and
//! what it needs. `player.rs` carries them out.

use crate::text::{outside, parse_names, Pattern};

/// What a step does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    #[default]
    BeInTheRoom,
    Console,
    SignalServer,
    ServerExits,
    Connect,
    Send,
    IsClosed,
    ReceiveSome,
    ReceiveAllTold,
    Receive,
    ReceiveBytes,
    ReceiveAfter,
    Close,
    HalfClose,
    Reset,
    StopReading,
    FallBehind,
    Flood,
    ReadSlowly,
    IsCutOff,
    PassTime,
    Run,
    Show,
    Complain,
    ReceiveSignal,
    Exit,
}

/// What a step needs. A transcript is skipped where that is missing.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub enum Needs {
    #[default]
    Nothing,
    /// Bytes cross the client as they are, and it can half-close.
    PlainClient,
    /// Nothing stands between the suite's socket and the server.
    DirectSocket,
    /// The server's process: its console, its end, or a signal.
    Process,
    OurClient,
    Terminal,
}

/// A row: words that stand there as they are, and WHO (names), NUMBER, WORD, TEXT (the rest), LINE
/// (the rest and LF), QUOTED (the rest in quotation marks); what the step does; what it needs.
type Form = (&'static str, Action, Needs);

/// The first form that fits is meant.
static FORMS: &[Form] = &[
    ("in the room: WHO", Action::BeInTheRoom, Needs::Nothing),
    ("console < TEXT", Action::Console, Needs::Process),
    ("server receives WORD", Action::SignalServer, Needs::Process),
    ("server exits NUMBER", Action::ServerExits, Needs::Process),
    ("WHO connects", Action::Connect, Needs::Nothing),
    ("WHO > LINE", Action::Send, Needs::Nothing),
    ("WHO >> TEXT", Action::Send, Needs::Nothing),
    ("WHO < [closed]", Action::IsClosed, Needs::Nothing),
    ("WHO < [some] TEXT", Action::ReceiveSome, Needs::Nothing),
    ("WHO < [all that was told]", Action::ReceiveAllTold, Needs::Nothing),
    ("WHO < TEXT", Action::Receive, Needs::Nothing),
    ("WHO << TEXT", Action::ReceiveBytes, Needs::PlainClient),
    ("WHO after NUMBER s < TEXT", Action::ReceiveAfter, Needs::Nothing),
    ("WHO closes", Action::Close, Needs::Nothing),
    ("WHO half-closes", Action::HalfClose, Needs::PlainClient),
    ("WHO resets", Action::Reset, Needs::DirectSocket),
    ("WHO resets after TEXT", Action::Reset, Needs::DirectSocket),
    ("WHO stops reading", Action::StopReading, Needs::DirectSocket),
    ("WHO falls behind what WORD tells", Action::FallBehind, Needs::DirectSocket),
    ("WHO floods LINE", Action::Flood, Needs::DirectSocket),
    ("WHO reads NUMBER KiB a second", Action::ReadSlowly, Needs::DirectSocket),
    ("WHO is cut off after NUMBER s", Action::IsCutOff, Needs::DirectSocket),
    ("NUMBER s pass", Action::PassTime, Needs::Nothing),
    ("WHO runs at NUMBER columns TEXT", Action::Run, Needs::Terminal),
    ("WHO runs TEXT", Action::Run, Needs::OurClient),
    ("WHO sees QUOTED", Action::Receive, Needs::OurClient),
    ("WHO shows QUOTED", Action::Show, Needs::Terminal),
    ("WHO complains QUOTED", Action::Complain, Needs::OurClient),
    ("WHO receives WORD", Action::ReceiveSignal, Needs::Terminal),
    ("WHO exits NUMBER", Action::Exit, Needs::OurClient),
];

/// One line of a transcript.
#[derive(Default)]
pub struct Step {
    pub line: usize,
    pub source: String,
    pub action: Action,
    pub needs: Needs,
    pub who: Vec<String>,
    /// As it is written.
    pub text: String,
    /// The bytes of the text, without what is open or only known while it is played.
    pub bytes: Vec<u8>,
    pub number: usize,
    pub word: String,
}

impl Step {
    pub fn parse(line: usize, source: &str) -> Result<Step, String> {
        for &(form, action, needs) in FORMS {
            let source = source.to_owned();
            let mut step = Step { line, source, action, needs, ..Step::default() };
            if step.fill_in(form)? {
                step.bytes = Pattern::parse(&step.text, &|_| None)?.0.concat();
                return Ok(step);
            }
        }
        Err("not a step".to_owned())
    }

    /// Reads the source as a form says. Returns false if it does not have that form.
    fn fill_in(&mut self, form: &str) -> Result<bool, String> {
        let source = self.source.clone();
        let mut rest = source.as_str();
        for token in form.split(' ') {
            match token {
                "TEXT" => self.text = std::mem::take(&mut rest).to_owned(),
                "LINE" => self.text = format!("{}\\n", std::mem::take(&mut rest)),
                "QUOTED" => {
                    let quoted = std::mem::take(&mut rest).strip_prefix('"');
                    let quoted = quoted.and_then(|quoted| quoted.strip_suffix('"'));
                    self.text = quoted.ok_or("a text in quotation marks is missing")?.to_owned();
                }
                "WHO" => {
                    let who = length_of_names(rest, form.starts_with("WHO"));
                    self.who = parse_names(&rest[..who])?;
                    rest = rest[who..].trim_start_matches(' ');
                    if self.who.is_empty() {
                        return Ok(false);
                    }
                }
                _ => {
                    let (word, after) = rest.split_once(' ').unwrap_or((rest, ""));
                    match (token, word.parse()) {
                        ("WORD", _) => self.word = word.to_owned(),
                        ("NUMBER", Ok(number)) => self.number = number,
                        _ if word == token => {}
                        _ => return Ok(false),
                    }
                    rest = after;
                }
            }
        }
        Ok(rest.is_empty())
    }
}

/// The length of the names that `text` begins with: all of it, or up to the first word that says
/// what they do.
fn length_of_names(text: &str, is_followed: bool) -> usize {
    let is_verb = |word: &str| {
        let mut verbs = FORMS.iter().filter_map(|(form, ..)| form.strip_prefix("WHO "));
        verbs.any(|verb| verb.split(' ').next() == Some(word))
    };
    let words = text.split(outside(' '));
    let names = words.take_while(|word| !is_followed || !is_verb(word));
    names.map(|word| word.len() + 1).sum::<usize>().min(text.len())
}
