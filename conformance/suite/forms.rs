//! The steps of transcripts as plain data: one table says how each is written, what it does, and
//! what it needs. `player.rs` carries them out.

use crate::text::{parse_names, split_words, Text};

/// Bytes that are a lot to send at once.
const LONG: usize = 200_000;

/// What a step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Repeat,
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
    MustWait,
    AreCutOff,
    PassTime,
    Run,
    Type,
    Press,
    EndInput,
    Show,
    Complain,
    Resize,
    ReceiveSignal,
    Exit,
}

/// What a step needs. A transcript is skipped where that is missing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    Nothing,
    /// What this client sends reaches the server as it is.
    PlainInput,
    /// What the server sends is seen as it is.
    PlainOutput,
    HalfClose,
    /// The client is a socket of the suite's.
    Socket,
    /// Nothing between server and suite reads on its own.
    OwnPace,
    /// The server's process, to read its console.
    Process,
    Signal,
    OurClient,
    Terminal,
}

/// A row of the table. `form` has words that stand there as they are, and WHO (names), NUMBER, WORD,
/// QUOTED (a text in quotation marks), TEXT (the rest), LINE (the rest and LF).
pub struct Form {
    pub form: &'static str,
    pub action: Action,
    pub needs: Needs,
}

const fn row(form: &'static str, action: Action, needs: Needs) -> Form {
    Form { form, action, needs }
}

/// The first form that fits is meant.
static FORMS: &[Form] = &[
    row("NUMBER times", Action::Repeat, Needs::Nothing),
    row("in the room: WHO", Action::BeInTheRoom, Needs::PlainInput),
    row("console < TEXT", Action::Console, Needs::Process),
    row("server receives WORD", Action::SignalServer, Needs::Signal),
    row("server exits NUMBER", Action::ServerExits, Needs::Process),
    row("WHO connects", Action::Connect, Needs::Nothing),
    row("WHO > LINE", Action::Send, Needs::PlainInput),
    row("WHO >> TEXT", Action::Send, Needs::PlainInput),
    row("WHO < [closed]", Action::IsClosed, Needs::Nothing),
    row("WHO < [some] TEXT", Action::ReceiveSome, Needs::Nothing),
    row("WHO < [all that was told]", Action::ReceiveAllTold, Needs::Socket),
    row("WHO < TEXT", Action::Receive, Needs::Nothing),
    row("WHO << TEXT", Action::ReceiveBytes, Needs::PlainOutput),
    row("WHO after NUMBER s < TEXT", Action::ReceiveAfter, Needs::Nothing),
    row("WHO closes", Action::Close, Needs::Nothing),
    row("WHO half-closes", Action::HalfClose, Needs::HalfClose),
    row("WHO resets", Action::Reset, Needs::Socket),
    row("WHO resets behind TEXT", Action::Reset, Needs::Socket),
    row("WHO stops reading", Action::StopReading, Needs::OwnPace),
    row("WHO falls behind what WORD tells", Action::FallBehind, Needs::Socket),
    row("WHO floods LINE", Action::Flood, Needs::Socket),
    row("WHO reads NUMBER KiB a second", Action::ReadSlowly, Needs::Socket),
    row("WHO must wait while nobody reads the answers to LINE", Action::MustWait, Needs::Socket),
    row("WHO is cut off after NUMBER s", Action::AreCutOff, Needs::Socket),
    row("NUMBER s pass", Action::PassTime, Needs::Nothing),
    row("WHO runs at NUMBER columns TEXT", Action::Run, Needs::Terminal),
    row("WHO runs TEXT", Action::Run, Needs::OurClient),
    row("WHO types QUOTED", Action::Type, Needs::OurClient),
    row("WHO presses QUOTED", Action::Press, Needs::OurClient),
    row("WHO ends the input", Action::EndInput, Needs::OurClient),
    row("WHO sees QUOTED", Action::Receive, Needs::OurClient),
    row("WHO shows QUOTED", Action::Show, Needs::Terminal),
    row("WHO complains QUOTED", Action::Complain, Needs::OurClient),
    row("WHO resizes to NUMBER columns", Action::Resize, Needs::Terminal),
    row("WHO receives WORD", Action::ReceiveSignal, Needs::Terminal),
    row("WHO exits NUMBER", Action::Exit, Needs::OurClient),
];

impl Action {
    /// It only looks at what has come.
    pub fn asserts(self) -> bool {
        use Action::*;
        matches!(
            self,
            Console
                | ServerExits
                | IsClosed
                | ReceiveSome
                | ReceiveAllTold
                | Receive
                | ReceiveBytes
                | ReceiveAfter
                | MustWait
                | AreCutOff
                | Show
                | Complain
                | Exit
        )
    }
}

/// One line of a transcript.
pub struct Step {
    pub line: usize,
    pub source: String,
    pub action: Action,
    pub needs: Needs,
    pub who: Vec<String>,
    pub text: Text,
    pub number: usize,
    pub word: String,
    /// The steps to repeat.
    pub block: Vec<Step>,
}

impl Step {
    pub fn parse(line: usize, source: &str) -> Result<Step, String> {
        for form in FORMS {
            let mut step = Step {
                line,
                source: source.to_owned(),
                action: form.action,
                needs: form.needs,
                who: Vec::new(),
                text: Text::default(),
                number: 0,
                word: String::new(),
                block: Vec::new(),
            };
            if step.fill_in(form.form, source)? {
                return Ok(step);
            }
        }
        Err("not a step".to_owned())
    }

    /// It sends more than can wait anywhere without being read.
    pub fn is_long(&self) -> bool {
        self.text.bytes().nth(LONG).is_some()
    }

    /// Reads `rest` as a form says. Returns whether it has that form.
    fn fill_in(&mut self, form: &str, mut rest: &str) -> Result<bool, String> {
        for token in form.split(' ') {
            match token {
                "LINE" | "TEXT" => {
                    let end = if token == "LINE" { "\\n" } else { "" };
                    self.text = format!("{rest}{end}").parse()?;
                    return Ok(true);
                }
                "QUOTED" => {
                    let quoted = rest.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
                    self.text = quoted.ok_or("a text in quotation marks is missing")?.parse()?;
                    return Ok(true);
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
                    let (word, behind) = rest.split_once(' ').unwrap_or((rest, ""));
                    match token {
                        "WORD" => self.word = word.to_owned(),
                        "NUMBER" => match word.parse() {
                            Ok(number) => self.number = number,
                            Err(_) => return Ok(false),
                        },
                        _ if word != token => return Ok(false),
                        _ => {}
                    }
                    rest = behind;
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
        let mut verbs = FORMS.iter().filter_map(|form| form.form.strip_prefix("WHO "));
        verbs.any(|verb| verb.split(' ').next() == Some(word))
    };
    let words = split_words(text).into_iter();
    let names = words.take_while(|(word, _)| !is_followed || !is_verb(word));
    names.last().map_or(0, |(_, end)| end)
}
