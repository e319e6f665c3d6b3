// SPDX-License-Identifier: Apache-2.0

package app

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"

	procv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"

	"github.com/baton-epp/baton/internal/gatewaytest"
	"github.com/baton-epp/baton/simulate"
)

// oldPair is one prefill and one decode engine of the generation that counts transferred tokens as cached.
func oldPair() simulate.PoolOptions {
	o := fast(1, 1)
	o.Template.Generation = "old"
	return o
}

// usageRequest asks for an answer whose usage says what was cached.
type usageRequest struct{ path, body string }

// usageRequests is one request for each API and way to answer, each with a prompt of its own.
func usageRequests() map[string]usageRequest {
	all := map[string]usageRequest{}
	for way, extra := range map[string]string{"whole": `"stream":false`, "streamed": `"stream":true,"stream_options":{"include_usage":true}`} {
		for path, format := range map[string]string{
			"/v1/chat/completions": `{"model":"tiny","max_tokens":4,"messages":[{"role":"user","content":%q}],%s}`,
			"/v1/completions":      `{"model":"tiny","max_tokens":4,"prompt":%q,%s}`,
			"/v1/responses":        `{"model":"tiny","max_output_tokens":4,"input":%q,%s}`,
		} {
			options := extra
			if path == "/v1/responses" { // which always says it
				options, _, _ = strings.Cut(extra, `,"stream_options"`)
			}
			name := strings.ReplaceAll(strings.TrimPrefix(path, "/v1/"), "/", " ") + "/" + way
			all[name] = usageRequest{path, fmt.Sprintf(format, name+strings.Repeat(" word", 100), options)}
		}
	}
	return all
}

var (
	cachedCount = regexp.MustCompile(`"cached_tokens":(\d+ *)[,}]`)
	promptCount = regexp.MustCompile(`"(?:prompt|input)_tokens":(\d+)[,}]`)
)

// said reads what an answer says of its prompt's tokens, and checks that every JSON text in it is one.
func said(t *testing.T, body string) (prompt, cached int) {
	t.Helper()
	for line := range strings.SplitSeq(body, "\n") {
		text, isData := strings.CutPrefix(line, "data: ")
		if (isData || strings.HasPrefix(line, "{")) && text != "[DONE]" && !json.Valid([]byte(text)) {
			t.Fatalf("not JSON: %s", line)
		}
	}
	p, c := promptCount.FindStringSubmatch(body), cachedCount.FindAllStringSubmatch(body, -1)
	if p == nil || len(c) != 1 {
		t.Fatalf("no usage, or more than one: %s", body)
	}
	prompt, _ = strconv.Atoi(p[1])
	cached, err := strconv.Atoi(strings.TrimRight(c[0][1], " "))
	if err != nil {
		t.Fatal(err)
	}
	return prompt, cached
}

// TestUsageOfOldEngines: a decode engine that counts what was transferred as cached is corrected by what the prefill
// engine found, where the gateway shows response bodies; where it does not, the client sees decode's count.
func TestUsageOfOldEngines(t *testing.T) {
	t.Parallel()
	for name, r := range usageRequests() {
		for _, mode := range []procv3.ProcessingMode_BodySendMode{gatewaytest.Duplex, gatewaytest.None} {
			t.Run(name+"/"+mode.String(), func(t *testing.T) {
				t.Parallel()
				s := newStack(t, stackOptions{noEnvoy: true, pool: oldPair()})
				g, err := gatewaytest.New(gatewaytest.Options{Picker: s.app.Addr().String(), Request: gatewaytest.Duplex, Response: mode})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = g.Close() })
				for round := range 2 {
					reply, err := g.Do(t.Context(), r.path, []byte(r.body))
					if err != nil || reply.Status != 200 || reply.Header.Get("x-baton-outcome") != "disaggregated" {
						t.Fatalf("%v, %+v", err, reply)
					}
					checkSaid(t, string(reply.Body), round, mode == gatewaytest.Duplex)
				}
				corrected := 0.0
				if mode == gatewaytest.Duplex {
					corrected = 2
				}
				if n := s.sum("baton_extproc_usage_corrected_total"); n != corrected {
					t.Errorf("%v responses counted, want %v", n, corrected)
				}
				s.settled()
			})
		}
	}
}

// checkSaid checks the answer to a prompt that is sent for the first or the second time.
func checkSaid(t *testing.T, body string, round int, corrected bool) {
	t.Helper()
	prompt, cached := said(t, body)
	whole := (prompt - 1) / 16 * 16 // full blocks; the last token is always computed
	want := []int{0, whole}[round]
	if !corrected {
		want = prompt
	}
	if cached != want {
		t.Errorf("request %d: %d of %d tokens cached, want %d: %s", round+1, cached, prompt, want, body)
	}
}

// TestUsageOfMessages: Anthropic's two counts add up, and are left alone.
func TestUsageOfMessages(t *testing.T) {
	t.Parallel()
	s := newStack(t, stackOptions{noEnvoy: true, pool: oldPair()})
	g, err := gatewaytest.New(gatewaytest.Options{Picker: s.app.Addr().String(), Request: gatewaytest.Duplex, Response: gatewaytest.Duplex})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.Close() })
	reply, err := g.Do(t.Context(), "/v1/messages", []byte(chatBody(100, "")))
	if err != nil || reply.Status != 200 {
		t.Fatalf("%v, %+v", err, reply)
	}
	var answer struct {
		Usage struct {
			Input int `json:"input_tokens"`
			Read  int `json:"cache_read_input_tokens"`
		}
	}
	if err := json.Unmarshal(reply.Body, &answer); err != nil || answer.Usage.Input != 0 || answer.Usage.Read < 100 {
		t.Errorf("%v: %s", err, reply.Body)
	}
	if n := s.sum("baton_extproc_usage_corrected_total"); n != 0 {
		t.Errorf("%v responses counted", n)
	}
	s.settled()
}
