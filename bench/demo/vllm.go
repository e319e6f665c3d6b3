// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"
)

// Ports of the two vLLM servers, counted from the first one.
const (
	vllmPrefillPort = 100
	vllmDecodePort  = 200
	sideChannel     = 1 // added to a server's port: where the KV blocks are asked for
)

const vllmLimit = 5 * time.Minute

func vllmPorts() []int {
	return []int{vllmPrefillPort, vllmPrefillPort + sideChannel, vllmDecodePort, vllmDecodePort + sideChannel}
}

// startVLLM starts a prefill and a decode server and waits until both answer.
func (s *stack) startVLLM(ctx context.Context) error {
	for _, v := range []struct {
		role, kvRole string
		port         int
	}{
		{phasePrefill, "kv_producer", s.o.port(vllmPrefillPort)},
		{phaseDecode, "kv_consumer", s.o.port(vllmDecodePort)},
	} {
		if err := s.super.start(ctx, vllmServer(s.o, v.role, v.kvRole, v.port)); err != nil {
			return err
		}
		addr := netip.MustParseAddrPort(loopback(v.port))
		s.engines = append(s.engines, engine{Name: v.role + "-0", Role: v.role, Addr: addr})
	}
	if err := writeEngines(s.o.Dir, s.engines); err != nil {
		return err
	}
	return s.super.until(ctx, "the start of vLLM", vllmLimit, func(ctx context.Context) error {
		for _, e := range s.engines {
			if err := s.ok(ctx, e.url("/health")); err != nil {
				return err
			}
		}
		return nil
	})
}

// vllmServer is the command of one server. Both stay in the demo's session: the kernel shares the cores among sessions,
// and two of spinning threads starve each other.
func vllmServer(o options, role, kvRole string, port int) command {
	transfer := map[string]any{
		"kv_connector": "NixlConnector", "kv_role": kvRole, "kv_buffer_device": "cpu",
		"kv_connector_extra_config": map[string]any{"num_threads": 0},
	}
	text, err := json.Marshal(transfer)
	if err != nil {
		text = nil // cannot happen: the map holds strings and a number
	}
	bin := filepath.Join(o.VLLM, "venv", "bin")
	c := command{
		Name: "vllm-" + role,
		Path: filepath.Join(bin, "vllm"),
		Args: []string{
			"serve", filepath.Join(o.VLLM, "model"), "--served-model-name", o.model(), "--host", "127.0.0.1", "--port", strconv.Itoa(port),
			"--dtype", "float32", "--max-model-len", "8192", "--block-size", "32", "--num-gpu-blocks-override", "1200",
			"--enable-prefix-caching", "--enforce-eager", "--max-num-seqs", "8", "--max-num-batched-tokens", "512",
			"--kv-transfer-config", string(text),
		},
		Env: []string{
			"PATH=" + bin + ":" + os.Getenv("PATH"),
			"HF_HUB_OFFLINE=1", "TRANSFORMERS_OFFLINE=1", "VLLM_NO_USAGE_STATS=1", "DO_NOT_TRACK=1",
			"VLLM_TARGET_DEVICE=cpu", "VLLM_CPU_KVCACHE_SPACE=1", "VLLM_CPU_OMP_THREADS_BIND=nobind", "OMP_NUM_THREADS=1",
			"VLLM_NIXL_SIDE_CHANNEL_HOST=127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT=" + strconv.Itoa(port+sideChannel),
		},
	}
	// Without this shim, which scripts/demo-vllm.sh builds where there is a C compiler, NIXL keeps a core busy per server.
	if calm := filepath.Join(o.VLLM, "calm.so"); exists(calm) {
		c.Env = append(c.Env, "LD_PRELOAD="+calm)
	}
	return c
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// An answer is what is read of a whole answer.
type answer struct {
	Choices []struct {
		TokenIDs []int `json:"token_ids"`
	} `json:"choices"`
}

// ask sends r and returns the tokens of the answer and how Baton served it.
func (c *client) ask(ctx context.Context, r chat, salt string) (tokens []int, outcome string, err error) {
	b := c.body(r)
	b.CacheSalt, b.TokenIDs = salt, true
	resp, err := c.post(ctx, r.ID, b)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, "", fmt.Errorf("%s: status %d", r.ID, resp.StatusCode)
	}
	var a answer
	if err := json.NewDecoder(resp.Body).Decode(&a); err != nil {
		return nil, "", fmt.Errorf("%s: %w", r.ID, err)
	}
	if len(a.Choices) != 1 || len(a.Choices[0].TokenIDs) == 0 {
		return nil, "", fmt.Errorf("%s: an answer without tokens", r.ID)
	}
	return a.Choices[0].TokenIDs, resp.Header.Get("X-Baton-Outcome"), nil
}

var errNotDisaggregated = errors.New("answered by one server alone")

// longOnes returns the requests to compare: a few whose prompts are long enough to be disaggregated.
func longOnes(all []chat) []chat {
	const (
		few      = 5
		tokens   = 24
		minBytes = 3000
	)
	var out []chat
	for _, r := range all {
		if len(r.System)+len(r.User) >= minBytes && len(out) < few {
			r.MaxTokens = tokens
			out = append(out, r)
		}
	}
	return out
}

// compare sends prompts both ways: through Envoy and Baton, prefilled on one server and decoded on the other, and straight to
// the decode server, which then does both. At temperature 0 the tokens must be equal.
func (s *stack) compare(ctx context.Context, chats []chat, say func(format string, args ...any)) (equal int, err error) {
	split, whole := s.client(), s.client()
	whole.base = s.engines[len(s.engines)-1].url("")
	for i, r := range chats {
		r.ID = fmt.Sprintf("compare-%d", i+1)
		got, outcome, err := split.ask(ctx, r, "")
		if err != nil {
			return equal, err
		}
		if outcome != outcomeDisaggregated {
			return equal, fmt.Errorf("%s: %w (outcome %q)", r.ID, errNotDisaggregated, outcome)
		}
		// The salt keeps the decode server from using the blocks it has just pulled.
		want, _, err := whole.ask(ctx, r, "aggregated")
		if err != nil {
			return equal, err
		}
		verdict := "DIFFERENT"
		if slices.Equal(got, want) {
			verdict = "equal"
			equal++
		}
		say("  a prompt of %s bytes, %d tokens of answer: %s", number(len(r.System)+len(r.User)), len(got), verdict)
	}
	return equal, nil
}
