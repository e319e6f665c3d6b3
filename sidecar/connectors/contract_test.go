// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-epp/baton/inference"
)

// everyLeg calls f for each connector that is built and each client's request that it serves.
func everyLeg(t *testing.T, f func(t *testing.T, wire Connector, name string)) {
	t.Helper()
	for _, connector := range slices.Sorted(maps.Keys(registry())) {
		wire, traits, err := Lookup(connector)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range slices.Sorted(maps.Keys(clients)) {
			if traits.Serves(clients[name]) {
				t.Run(connector+"/"+name, func(t *testing.T) { f(t, wire, name) })
			}
		}
	}
}

// TestPrefillIsOneUnstreamedAnswer also shows that attempts do not disturb each other: each starts from fresh edits and
// an exchange of its own, and writes the same but for what is minted.
func TestPrefillIsOneUnstreamedAnswer(t *testing.T) {
	everyLeg(t, func(t *testing.T, wire Connector, name string) {
		t.Helper()
		r := client(t, name)
		var attempts [2][]byte
		var tickets [2]string
		for i := range attempts {
			x, body := between(r), stripped(r)
			wire.Prefill(x, body)
			attempts[i], tickets[i] = withoutIDs(x, written(t, body)), x.Ticket
		}
		leg := fields(t, attempts[0])
		if leg["stream"] != false || leg["stream_options"] != nil {
			t.Errorf("streams: %s", attempts[0])
		}
		if tickets[0] != "" && tickets[0] == tickets[1] {
			t.Errorf("minted %s twice", tickets[0])
		}
		if tickets[0] == "" {
			if diff := cmp.Diff(string(attempts[0]), string(attempts[1])); diff != "" {
				t.Errorf("second attempt (-first +second):\n%s", diff)
			}
		}
		if n, ok := leg["n"].(json.Number); ok && n != "1" && !strings.Contains(t.Name(), "/sglang") { // whose legs need the same n
			t.Errorf("makes %s choices", n)
		}
		checkUnmoved(t, r, attempts[0], prefillEdits)
	})
}

// TestWithdrawGivesBackTheClientsBody takes back what Decode wrote, after which the body is the client's without its
// transfer fields, and does so twice and by an exchange of its own, as the orchestrator does.
func TestWithdrawGivesBackTheClientsBody(t *testing.T) {
	everyLeg(t, func(t *testing.T, wire Connector, name string) {
		t.Helper()
		r := client(t, name)
		x, body := between(r), stripped(r)
		wire.Prefill(x, stripped(r))
		want := string(written(t, stripped(r)))
		connector := strings.Split(t.Name(), "/")[1]
		if connector == "nixlv2" {
			connector = "nixlv2-push"
		}
		answer, err := os.ReadFile(filepath.Join("testdata", connector, name+".answer.json"))
		if err == nil {
			if a := wire.Answer(x, answer); a.Verdict == Ready {
				wire.Decode(x, a.Handle, body)
			}
		} else {
			wire.Decode(x, nil, body)
		}
		checkUnmoved(t, r, written(t, body), decodeEdits)
		for range 2 {
			wire.Withdraw(between(r), body)
			if diff := cmp.Diff(want, string(written(t, body))); diff != "" {
				t.Errorf("-client +after Withdraw:\n%s", diff)
			}
		}
	})
}

// TestDecodeWithoutHandle shows that no connector needs one to write a body that parses: a rendezvous never has one.
func TestDecodeWithoutHandle(t *testing.T) {
	everyLeg(t, func(t *testing.T, wire Connector, name string) {
		t.Helper()
		r := client(t, name)
		x, body := between(r), stripped(r)
		wire.Prefill(x, stripped(r))
		wire.Decode(x, nil, body)
		parse(t, r.API, written(t, body))
	})
}

// hostile are answers of a prefill endpoint that is broken, or not one.
var hostile = []string{
	``, ` `, `null`, `true`, `7`, `"x"`, `[]`, `[{}]`, `{`, `{}`, ` {} `, `{"":{}}`, "\xff", "{\"a\":\"\xff\"}", `<html>`,
	`{"kv_transfer_params":{}}`, `{"kv_transfer_params":[]}`, `{"kv_transfer_params":"x"}`, `{"kv_transfer_params":7}`,
	`{"kv_transfer_params":{"first_tok":null}}`, `{"kv_transfer_params":{"first_tok":"7"}}`, `{"kv_transfer_params":true}`,
	`{"choices":null}`, `{"choices":7}`, `{"choices":[]}`, `{"choices":[ ]}`, `{"choices":[null]}`, `{"choices":[[]]}`,
	`{"choices":[7]}`, `{"choices":["x"]}`, `{"choices":[{}]}`, `{"choices":[{},{}]}`, `{"choices":{"0":{}}}`,
	`{"choices":[{"disaggregated_params":null}]}`, `{"choices":[{"disaggregated_params":[]}]}`,
	`{"choices":[{"disaggregated_params":{}}]}`, `{"choices":[{"disaggregated_params":"x"}],"prompt_token_ids":[[1]]}`,
	`{"choices":[{"finish_reason":{"type":"error"}}]}`, `{"usage":7}`, `{"usage":[]}`, `{"usage":{"prompt_tokens":-1}}`,
	`{"usage":{"prompt_tokens_details":[],"cache_read_input_tokens":-1}}`, `{"usage":{"prompt_tokens_details":{"cached_tokens":1e9}}}`,
	`{"error":null}`, `{"error":{}}`, `{"error":"x"}`, `{"object":"error"}`, `{"object":7}`,
	strings.Repeat(`[`, 5000), `{"choices":` + strings.Repeat(`[`, 5000) + strings.Repeat(`]`, 5000) + `}`,
}

// checkAnswer shows that a connector takes any answer, and makes no handle that is not JSON, or that decode's body does
// not stay JSON with.
func checkAnswer(t *testing.T, name string, e entry, r *inference.Request, answer []byte) {
	t.Helper()
	x := between(r)
	e.connector.Prefill(x, stripped(r))
	mine := bytes.Clone(answer)
	a := e.connector.Answer(x, mine)
	if a.Verdict > Malformed || a.PromptTokens < 0 || a.CachedTokens < -1 {
		t.Errorf("%s: %+v of %q", name, a, answer)
	}
	if object := bytes.TrimLeft(answer, " \t\r\n"); e.traits.Shape == Serial && a.Verdict == Ready && (len(object) == 0 || object[0] != '{') {
		t.Errorf("%s: ready by %q", name, answer)
	}
	if (e.traits.Proven == realEngine || name == "trtllm" || name == "moriio") && a.Verdict == Ready && a.Handle == nil {
		t.Errorf("%s: ready without a handle: %q", name, answer)
	}
	if a.Handle != nil {
		if a.Verdict != Ready || !json.Valid(a.Handle) {
			t.Errorf("%s: handle %q of %q", name, a.Handle, answer)
		}
		kept := string(a.Handle)
		for i := range mine {
			mine[i] = 'x'
		}
		if string(a.Handle) != kept {
			t.Errorf("%s: the handle is part of the answer", name)
		}
	}
	if a.Verdict == Ready {
		body := stripped(r)
		e.connector.Decode(x, a.Handle, body)
		parse(t, r.API, written(t, body))
	}
	if asker, ok := e.connector.(Asker); ok {
		asker.Enough(x, answer)
	}
	if introducer, ok := e.connector.(Introducer); ok {
		_ = introducer.Introduced(answer)
	}
}

// TestHostileAnswers feeds every connector what no engine should say.
func TestHostileAnswers(t *testing.T) {
	for name, e := range registry() {
		r := client(t, "completions")
		if !e.traits.Serves(r.API) {
			r = client(t, "chat")
		}
		for _, answer := range append(slices.Clone(hostile), realAnswers(t)...) {
			checkAnswer(t, name, e, r, []byte(answer))
		}
	}
}

// realAnswers are those in testdata.
func realAnswers(tb testing.TB) (list []string) {
	tb.Helper()
	files, err := filepath.Glob("testdata/*/*.answer.json")
	if err != nil || len(files) == 0 {
		tb.Fatal(len(files), err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			tb.Fatal(err)
		}
		list = append(list, string(b))
	}
	return list
}

// FuzzAnswer lets a prefill endpoint say anything to every connector.
func FuzzAnswer(f *testing.F) {
	for _, answer := range append(slices.Clone(hostile[:len(hostile)-2]), realAnswers(f)...) {
		f.Add([]byte(answer))
	}
	f.Add([]byte(`{"kv_transfer_params":` + handle + `}`))
	f.Add([]byte(`{"kv_transfer_params":` + strings.Replace(handle, `"zz":`, `"nan":NaN,"zz":`, 1) + `}`))
	r := client(f, "completions")
	f.Fuzz(func(t *testing.T, answer []byte) {
		for name, e := range registry() {
			checkAnswer(t, name, e, r, answer)
		}
	})
}
