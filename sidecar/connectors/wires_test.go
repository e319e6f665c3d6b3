// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
)

// clients are the requests that goldens are made of, in testdata/clients: everything that a careless copy would change.
var clients = map[string]inference.API{
	"completions": inference.Completions, "completions_tokens": inference.Completions,
	"chat": inference.Chat, "chat_n": inference.Chat,
	"responses": inference.Responses, "messages": inference.Messages,
	"generate": inference.Generate, "generate_extra": inference.Generate,
	"sglang": inference.SGLangGenerate, "sglang_bare": inference.SGLangGenerate,
}

func client(tb testing.TB, name string) *inference.Request {
	tb.Helper()
	body, err := os.ReadFile(filepath.Join("testdata/clients", name+".json"))
	if err != nil {
		tb.Fatal(err)
	}
	return parse(tb, clients[name], body)
}

// between is an exchange between a prefill endpoint at rank 2 of its pod and a decode endpoint.
func between(r *inference.Request) *Exchange {
	return &Exchange{
		Request: r, Ports: config.Default().Disaggregation.Ports, Rank: -1,
		Prefiller: &pool.Endpoint{Addr: netip.MustParseAddrPort("10.0.0.9:8002"), Rank: 2},
		Decode:    &pool.Endpoint{Addr: netip.MustParseAddrPort("[fd00::7%eth0]:8000")},
		Facts:     []byte(`{"0":{"engine_id":"e-0"}}`),
	}
}

// stripped is an empty list of edits as connectors get them.
func stripped(r *inference.Request) *inference.Edits {
	e := r.Edit()
	e.StripTransferFields()
	return e
}

func written(tb testing.TB, e *inference.Edits) []byte {
	tb.Helper()
	body := bytes.Join(e.Chunks(), nil)
	if len(body) != e.Len() {
		tb.Errorf("%d bytes, edits say %d", len(body), e.Len())
	}
	if !json.Valid(body) {
		tb.Errorf("no JSON: %s", body)
	}
	return body
}

var uuid = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}`)

// withoutIDs replaces what was minted by chance.
func withoutIDs(x *Exchange, body []byte) []byte {
	if x.Ticket != "" && strings.Trim(x.Ticket, "0123456789") == "" {
		body = bytes.ReplaceAll(body, []byte(x.Ticket), []byte("9007199254740993"))
	}
	var seen []string
	return uuid.ReplaceAllFunc(body, func(id []byte) []byte {
		i := slices.Index(seen, string(id))
		if i < 0 {
			i = len(seen)
			seen = append(seen, string(id))
		}
		return fmt.Appendf(nil, "00000000-0000-4000-8000-%012d", i+1)
	})
}

// TestWires compares both legs of every connector and API with reviewed files, byte for byte, and shows that nothing
// moved but what may be edited.
func TestWires(t *testing.T) {
	f := func(dir, connector string) {
		t.Helper()
		wire, traits, err := Lookup(connector)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range slices.Sorted(maps.Keys(clients)) {
			if traits.Serves(clients[name]) {
				t.Run(dir+"/"+name, func(t *testing.T) { checkLegs(t, filepath.Join(dir, name), wire, client(t, name)) })
			}
		}
	}
	f("nixlv2-push", "nixlv2")
	f("shared-storage", "shared-storage")
	f("offloading", "offloading")
	f("moriio", "moriio")
	f("trtllm", "trtllm")
	f("lmcache-pd", "lmcache-pd")
}

func checkLegs(t *testing.T, name string, wire Connector, r *inference.Request) {
	t.Helper()
	x := between(r)
	prefill, decode := stripped(r), stripped(r)
	wire.Prefill(x, prefill)
	leg := written(t, prefill)
	compare(t, name+".prefill.golden.json", withoutIDs(x, leg))
	checkUnmoved(t, r, leg, prefillEdits)

	answer, err := os.ReadFile(filepath.Join("testdata", name+".answer.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return // more than the wire carries
	}
	a := wire.Answer(x, answer)
	if a.Verdict != Ready || a.PromptTokens != 41 || a.CachedTokens != 32 {
		t.Errorf("answer: %+v", a)
	}
	wire.Decode(x, a.Handle, decode)
	leg = written(t, decode)
	compare(t, name+".decode.golden.json", withoutIDs(x, leg))
	checkUnmoved(t, r, leg, decodeEdits)
}

func compare(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

// What connectors may change, at the top level and in sampling_params.
var (
	decodeEdits = []string{
		transferField, "disaggregated_params", "prompt", "prompt_token_ids", "extra_args", thresholdField,
		"bootstrap_host", "bootstrap_port", "bootstrap_room", "rid",
	}
	prefillEdits = append([]string{
		"stream", "stream_options", "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens",
		"min_completion_tokens", "max_new_tokens", "min_new_tokens", "n", "return_token_ids", "background",
	}, decodeEdits...)
)

// checkUnmoved shows that a leg's other fields are the client's, byte for byte and in order.
func checkUnmoved(tb testing.TB, r *inference.Request, leg []byte, edited []string) {
	tb.Helper()
	want, got := unedited(tb, bytes.Join(r.Body.Chunks, nil), edited), unedited(tb, leg, edited)
	if diff := cmp.Diff(want, got); diff != "" {
		tb.Errorf("moved (-client +leg):\n%s", diff)
	}
}

// unedited lists an object's members but those edited, and those of sampling_params.
func unedited(tb testing.TB, object []byte, edited []string) (list []string) {
	tb.Helper()
	dec := json.NewDecoder(bytes.NewReader(object))
	if _, err := dec.Token(); err != nil {
		tb.Fatal(err)
	}
	for dec.More() {
		token, err := dec.Token()
		if err != nil {
			tb.Fatal(err)
		}
		key, _ := token.(string)
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			tb.Fatal(err)
		}
		switch {
		case slices.Contains(edited, key):
		case key == "sampling_params" && value[0] == '{':
			list = append(list, unedited(tb, value, edited)...)
		default:
			list = append(list, key+" "+string(value))
		}
	}
	return list
}
