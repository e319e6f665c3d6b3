// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
)

// minDisaggregated is the share of answered requests, in percent, below which the demo has not shown its point.
const minDisaggregated = 30

// A summary is what the demo says in the end.
type summary struct {
	snapshot snapshot
	ledger   ledger
	compared int // answers compared with an aggregated run; 0 where none were
	equal    int
	left     []string // processes of which something is left
	trouble  []error  // what kept the demo from looking
}

// problems says what was not as it should be; empty is success.
func (s *summary) problems() []string {
	var out []string
	say := func(bad bool, format string, args ...any) {
		if bad {
			out = append(out, fmt.Sprintf(format, args...))
		}
	}
	t := s.snapshot.Totals
	for _, err := range s.trouble {
		say(true, "%v", err)
	}
	say(t.Answered+t.Failed == 0, "no request was answered")
	say(t.Failed > 0, "%d requests failed, the first one %s", t.Failed, t.FirstError)
	say(t.Sent > t.Answered+t.Failed+t.Stopped, "%d requests were never answered", t.Sent-t.Answered-t.Failed-t.Stopped)
	say(100*t.Disaggregated < minDisaggregated*t.Answered, "only %s of the requests were disaggregated, %d%% at least are expected",
		percent(t.Disaggregated, t.Answered), minDisaggregated)
	say(t.Disaggregated > 0 && (s.ledger.Pulls == 0 || s.ledger.PulledTokens == 0), "no KV blocks moved between the model servers")
	say(t.Answered > 0 && t.PrefixHits == 0, "no request went to a server that knew the start of its prompt")
	say(t.Answered > 0 && s.ledger.CachedTokens == 0, "no server found a part of a prompt in its prefix cache")
	say(s.ledger.Leaked > 0, "%d finished prefills were never collected", s.ledger.Leaked)
	say(s.ledger.Wrong > 0, "%d transfers of KV blocks went wrong", s.ledger.Wrong)
	say(s.ledger.Held > 0, "%d uses of KV blocks were not over at the end", s.ledger.Held)
	say(s.equal < s.compared, "%d of %d answers differ from the aggregated ones", s.compared-s.equal, s.compared)
	say(len(s.left) > 0, "something of %s is still running", strings.Join(s.left, ", "))
	return out
}

// String is a few lines for people.
func (s *summary) String() string {
	var b strings.Builder
	t := s.snapshot.Totals
	fmt.Fprintf(&b, "\nIn %s: %d requests, %d answered, %d failed.\n", clock(s.snapshot.Elapsed), t.Sent, t.Answered, t.Failed)
	fmt.Fprintf(&b, "  %s (%d) were prefilled on one server and decoded on another; %s prompt tokens moved between them in %d transfers.\n",
		percent(t.Disaggregated, t.Answered), t.Disaggregated, number(s.ledger.PulledTokens), s.ledger.Pulls)
	fmt.Fprintf(&b, "  %d went to a server that knew the start of their prompt; %s prompt tokens were found in prefix caches.\n",
		t.PrefixHits, number(s.ledger.CachedTokens))
	fmt.Fprintf(&b, "  The first token came after %s (median), 95%% below %s.\n", milliseconds(s.snapshot.Median), milliseconds(s.snapshot.P95))
	if t.Fallbacks > 0 {
		fmt.Fprintf(&b, "  %d requests were to be disaggregated and were answered by one server alone.\n", t.Fallbacks)
	}
	if s.compared > 0 {
		fmt.Fprintf(&b, "  %d of %d answers equal those of one server doing it all.\n", s.equal, s.compared)
	}
	fmt.Fprintf(&b, "  KV blocks left behind: %d.\n", s.ledger.Leaked+s.ledger.Held)
	return b.String()
}
