// SPDX-License-Identifier: Apache-2.0

package scorers

import (
	"encoding/base64"
	"time"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

// sessionParameters configure a session-affinity-scorer (llm-d-router v0.10).
type sessionParameters struct {
	// Strategy is encoded_endpoint_header (default) or session_id.
	Strategy     string `yaml:"strategy"`
	EncodedStyle struct {
		Header string `yaml:"header"` // default x-session-token
	} `yaml:"encodedEndpointHeaderConfig"`
	SessionID struct {
		Sources []struct {
			Header    string `yaml:"header"`
			Attribute string `yaml:"attribute"` // needs session-id-producer, which is not built yet
			Producer  string `yaml:"producer"`
		} `yaml:"sources"` // default the header x-session-id; the first one present counts
		EvictionTTLSeconds   int `yaml:"evictionTtlSeconds"`   // default 300
		EvictionSweepSeconds int `yaml:"evictionSweepSeconds"` // default 10
	} `yaml:"sessionIdConfig"`
	// ProfileName is the profile whose pick is remembered: primary (default, the decode profile) or prefill.
	ProfileName string `yaml:"profileName"`
}

func newSessionAffinity(b *scheduler.Builder, raw config.Parameters) (any, error) {
	p := sessionParameters{Strategy: "encoded_endpoint_header", ProfileName: "primary"}
	p.EncodedStyle.Header = "x-session-token"
	p.SessionID.EvictionTTLSeconds, p.SessionID.EvictionSweepSeconds = 300, 10
	if err := raw.Decode(&p); err != nil {
		return nil, err
	}
	switch {
	case p.EncodedStyle.Header == "":
		return nil, raw.Errorf("encodedEndpointHeaderConfig.header", "is required")
	case p.SessionID.EvictionTTLSeconds <= 0:
		return nil, raw.Errorf("sessionIdConfig.evictionTtlSeconds", "%d, must be > 0", p.SessionID.EvictionTTLSeconds)
	case p.SessionID.EvictionSweepSeconds <= 0:
		return nil, raw.Errorf("sessionIdConfig.evictionSweepSeconds", "%d, must be > 0", p.SessionID.EvictionSweepSeconds)
	}
	switch p.Strategy {
	case "encoded_endpoint_header":
		s := &sessionToken{header: lower(p.EncodedStyle.Header)}
		b.Answer(s.answer)
		return s, nil
	case "session_id":
		headers := []string{"x-session-id"}
		if len(p.SessionID.Sources) > 0 {
			headers = headers[:0]
		}
		for i, source := range p.SessionID.Sources {
			if source.Header == "" {
				return nil, raw.Errorf("sessionIdConfig.sources["+itoa(i)+"]", "must name a header; attributes are known to llm-d, not built in Baton yet")
			}
			headers = append(headers, lower(source.Header))
		}
		return newSessionID(headers, time.Duration(p.SessionID.EvictionTTLSeconds)*time.Second, p.ProfileName == "prefill"), nil
	default:
		return nil, raw.Errorf("strategy", "%q, must be encoded_endpoint_header or session_id", p.Strategy)
	}
}

// maxToken bounds what is read of a session token: namespace and pod names have at most 253 characters each.
const maxToken = 800

// sessionToken is the stateless strategy: the client echoes a response header that holds the base64 of the endpoint's
// id. 1 for that endpoint, 0 for the others and for everybody without a token, or with one that means nothing.
type sessionToken struct{ header string }

// Score implements [scheduler.Scorer].
func (s *sessionToken) Score(cy *scheduler.Cycle, cands []scheduler.Candidate, out []float64) {
	clear(out)
	token := cy.Request.Headers.Get(s.header)
	if token == "" || len(token) > maxToken {
		return
	}
	var encoded, buf [maxToken]byte
	n, err := base64.StdEncoding.Decode(buf[:], encoded[:copy(encoded[:], token)])
	if err != nil {
		return
	}
	for i := range cands {
		if names(buf[:n], cands[i].Endpoint) {
			out[i] = 1
			return
		}
	}
}

// names reports whether id is e's: namespace/name with -rank-N behind it, which may be absent for rank 0 (llm-d always
// writes it).
func names(id []byte, e *pool.Endpoint) bool {
	ns, name := len(e.Namespace), len(e.Name)
	if len(id) < ns+1+name || string(id[:ns]) != e.Namespace || id[ns] != '/' || string(id[ns+1:ns+1+name]) != e.Name {
		return false
	}
	rest := id[ns+1+name:]
	if len(rest) == 0 {
		return e.Rank == 0
	}
	const mark = "-rank-"
	if len(rest) <= len(mark) || string(rest[:len(mark)]) != mark {
		return false
	}
	rank := 0
	for _, c := range rest[len(mark):] {
		if c < '0' || c > '9' || rank > 1<<20 {
			return false
		}
		rank = rank*10 + int(c-'0')
	}
	return rank == e.Rank
}

// answer is the header that the client is to echo.
func (s *sessionToken) answer(e *pool.Endpoint) inference.Header {
	return inference.Header{Name: s.header, Value: base64.StdEncoding.EncodeToString([]byte(e.ID()))}
}
