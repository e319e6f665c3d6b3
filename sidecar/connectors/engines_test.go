// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/simulate"
)

const words = `"one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"`

// TestSerialWiresMoveBlocks runs both legs of a request, one after the other, against a pair of simulated engines: decode
// fetches the blocks, answers what an engine alone answers, and leaves nothing behind. The simulated engines refuse what
// real ones are known to refuse; only nixlv2 was compared with real ones.
func TestSerialWiresMoveBlocks(t *testing.T) {
	bodies := map[inference.API]struct{ path, body string }{
		inference.Completions: {"/v1/completions", `{"model":"tiny","prompt":` + words + `,"max_tokens":6,"min_tokens":3,"temperature":0}`},
		inference.Chat: {
			"/v1/chat/completions",
			`{"model":"tiny","messages":[{"role":"user","content":` + words + `}],"max_completion_tokens":6,"temperature":0}`,
		},
		inference.Messages:  {"/v1/messages", `{"model":"tiny","messages":[{"role":"user","content":` + words + `}],"max_tokens":6,"temperature":0}`},
		inference.Responses: {"/v1/responses", `{"model":"tiny","input":` + words + `,"max_output_tokens":6,"temperature":0}`},
		inference.Generate: {
			"/inference/v1/generate",
			`{"model":"tiny","token_ids":[9,8,7,6,5,4,3,2,9,8,7,6,5,4,3,2,9,8,7],"sampling_params":{"max_tokens":6,"min_tokens":3,"temperature":0}}`,
		},
	}
	f := func(connector string, o simulate.Options) {
		t.Run(connector+"/"+o.Connector, func(t *testing.T) {
			wire, traits, err := Lookup(connector)
			if err != nil {
				t.Fatal(err)
			}
			for _, api := range traits.APIs {
				o.Peers, o.ScaleOut, o.Scale = simulate.NewRegistry(), true, 0.05
				prefiller, decoder, alone := start(t, o), start(t, o), start(t, o)
				r := parse(t, api, []byte(bodies[api].body))
				x, body := between(r), stripped(r)
				x.Prefiller = &pool.Endpoint{Addr: prefiller.Addr()}
				x.Ports.P2P = prefiller.P2PPort()
				wire.Prefill(x, body)
				a := wire.Answer(x, send(t, prefiller, bodies[api].path, body))
				if a.Verdict != Ready {
					t.Fatalf("%s: %+v", api, a)
				}
				body = stripped(r)
				wire.Decode(x, a.Handle, body)
				got := send(t, decoder, bodies[api].path, body)
				want := send(t, alone, bodies[api].path, r.Edit())
				if diff := cmp.Diff(said(t, want), said(t, got)); diff != "" {
					t.Errorf("%s (-alone +disaggregated):\n%s", api, diff)
				}
				if pulls := decoder.Pulls(); len(pulls) != 1 {
					t.Errorf("%s: %d pulls", api, len(pulls))
				}
				if !isIdle(t, prefiller) || len(prefiller.Leaked()) != 0 {
					t.Errorf("%s: prefill endpoint holds %v, leaked %v", api, prefiller.Held(), prefiller.Leaked())
				}
			}
		})
	}
	f("nixlv2", simulate.Options{Connector: "nixlv2"})
	f("nixlv2", simulate.Options{Connector: "nixl-push"})
	f("moriio", simulate.Options{Connector: "moriio"})
	f("offloading", simulate.Options{Connector: "offloading", HashSeed: "0"})
	f("trtllm", simulate.Options{Engine: "trtllm"})
}

// isIdle waits for e to hold no blocks: it may hear of a fetch just after decode answered.
func isIdle(t *testing.T, e *simulate.Engine) bool {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(5 * time.Second); len(e.Held()) != 0; <-tick.C {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

func start(t *testing.T, o simulate.Options) *simulate.Engine {
	t.Helper()
	e, err := simulate.New(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return e
}

func send(t *testing.T, e *simulate.Engine, path string, body *inference.Edits) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, e.URL()+path, body.Reader())
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %d %s %v", bytes.Join(body.Chunks(), nil), resp.StatusCode, answer, err)
	}
	return answer
}

// said is the part of an answer that a client reads: choices, content or output, without ids.
func said(t *testing.T, answer []byte) any {
	t.Helper()
	m := fields(t, answer)
	var list []any
	for _, name := range []string{"choices", "content", "output"} {
		list = append(list, withoutID(m[name]))
	}
	return list
}

func withoutID(v any) any {
	switch v := v.(type) {
	case map[string]any:
		delete(v, "id")
		for _, inner := range v {
			withoutID(inner)
		}
	case []any:
		for _, inner := range v {
			withoutID(inner)
		}
	case json.Number, string, bool, nil:
	}
	return v
}
