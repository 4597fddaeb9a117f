// Checks a grammar before llama.cpp uses it. llama.cpp's parser prints to stderr, recurses as deep as the text is nested, and
// expands some recursive rules without end.

#include "shim.hpp"

#include "llama-cpp.h"
#include "llama-grammar.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

namespace {

// Maximum nesting of parentheses; later versions of llama.cpp have the same limit.
constexpr int MOST_NESTED = 256;
// Maximum length of a chain of rules that begin with each other. llama.cpp follows the chain by recursion; this many levels fit
// into a thread's stack of 2 MiB.
constexpr int DEEPEST = 4096;
// Maximum number of ways in which a rule may begin; llama.cpp tries all of them.
constexpr uint64_t MOST_WAYS = 1 << 20;

const char * skip_quoted(const char * pos, char end) {
    while (*pos != '\0' && *pos != end) {
        pos += pos[0] == '\\' && pos[1] != '\0' ? 2 : 1;
    }
    return pos;
}

bool is_nested_too_deep(const char * pos) {
    int depth = 0;
    while (*pos != '\0') {
        switch (*pos) {
            case '"': pos = skip_quoted(pos + 1, '"'); break;
            case '[': pos = skip_quoted(pos + 1, ']'); break;
            case '#': pos += std::strcspn(pos, "\r\n"); break;
            case '(': ++depth; break;
            case ')': --depth; break;
        }
        if (depth > MOST_NESTED) {
            return true;
        }
        pos += *pos == '\0' ? 0 : 1;
    }
    return false;
}

// Parses the rules of a grammar. Throws a description of the first error.
void parse(llama_grammar_parser & parser, const char * pos) {
    // skip white space and comments before the first rule; parse_rule() skips those after a rule
    while (*pos != '\0' && std::strchr(" \t\r\n#", *pos) != nullptr) {
        pos += *pos == '#' ? std::strcspn(pos, "\r\n") : 1;
    }
    while (*pos != '\0') {
        pos = parser.parse_rule(pos);
    }
    for (const auto & [name, id] : parser.symbol_ids) {
        if (id >= parser.rules.size() || parser.rules[id].empty()) {
            throw std::runtime_error("there is no rule " + name);
        }
    }
    if (parser.symbol_ids.count("root") == 0) {
        throw std::runtime_error("there is no rule root, which is where the text begins");
    }
}

bool is_end(const llama_grammar_element & element) {
    return element.type == LLAMA_GRETYPE_END || element.type == LLAMA_GRETYPE_ALT;
}

// Finds rules that can never end, and left-recursive rules.
class checker {
  public:
    explicit checker(const llama_grammar_parser & parser)
        : parser(parser), rules(parser.rules), may_be_empty(rules.size()), may_end(rules.size()), nodes(rules.size()) {}

    void check() {
        find_properties();
        for (size_t i = 0; i < rules.size(); ++i) {
            if (!may_end[i]) {
                throw std::runtime_error("the rule " + name(i) + " never ends");
            }
            if (nodes[i].order == 0) {
                go_down(i, 1);
            }
        }
        // Recursion in the last element of an alternative is harmless, as in (a*)*. Any other left recursion adds elements to
        // read in each round.
        for (size_t i = 0; i < rules.size(); ++i) {
            each_first(i, [&](size_t next, bool is_last) {
                if (!is_last && nodes[i].cycle == nodes[next].cycle) {
                    throw std::runtime_error("left recursion: the rule " + name(i) + " leads back to itself before anything is read");
                }
            });
        }
    }

  private:
    struct node {
        size_t   order = 0; // order of discovery, from 1
        size_t   low   = 0; // lowest order of a node reachable from this one and still open
        size_t   cycle = 0; // number of the strongly connected component, from 1; 0: not known yet
        int      depth = 0;
        uint64_t ways  = 0;
    };

    const llama_grammar_parser & parser;
    const llama_grammar_rules  & rules;
    std::vector<bool>   may_be_empty;
    std::vector<bool>   may_end;
    std::vector<node>   nodes;
    std::vector<size_t> open;
    size_t n_found = 0;

    std::string name(size_t rule) const {
        for (const auto & [name, id] : parser.symbol_ids) {
            if (id == rule) {
                return name;
            }
        }
        return "?";
    }

    // Whether `fits` holds for all elements of some alternative of the rule.
    template <typename F>
    static bool any_alternative(const llama_grammar_rule & rule, F fits) {
        bool all = true;
        for (const auto & element : rule) {
            if (!is_end(element)) {
                all = all && fits(element);
            } else if (all) {
                return true;
            } else {
                all = true;
            }
        }
        return false;
    }

    void find_properties() {
        for (int round = 0; ; ++round) {
            bool changed = false;
            const auto update = [&](std::vector<bool> & property, size_t i, bool of_terminals) {
                const auto has = [&](const llama_grammar_element & element) {
                    return element.type == LLAMA_GRETYPE_RULE_REF ? property[element.value] : of_terminals;
                };
                if (!property[i] && any_alternative(rules[i], has)) {
                    property[i] = changed = true;
                }
            };
            for (size_t i = 0; i < rules.size(); ++i) {
                update(may_be_empty, i, false);
                update(may_end, i, true);
            }
            if (!changed) {
                return;
            }
            if (round == DEEPEST) {
                throw std::runtime_error("its rules are nested too deep");
            }
        }
    }

    // Calls f(rule, is_last) for each rule that an alternative of rule i may begin with.
    template <typename F>
    void each_first(size_t i, F f) {
        bool is_first = true;
        for (size_t e = 0; e < rules[i].size(); ++e) {
            const auto & element = rules[i][e];
            if (is_end(element)) {
                is_first = true;
            } else if (is_first) {
                is_first = element.type == LLAMA_GRETYPE_RULE_REF && may_be_empty[element.value];
                if (element.type == LLAMA_GRETYPE_RULE_REF) {
                    f(element.value, is_end(rules[i][e + 1]));
                }
            }
        }
    }

    // Tarjan's algorithm for strongly connected components.
    void go_down(size_t i, int level) {
        nodes[i].order = nodes[i].low = ++n_found;
        open.push_back(i);
        int depth = 0;
        uint64_t ways = 1;
        each_first(i, [&](size_t next, bool) {
            if (level == DEEPEST) {
                throw std::runtime_error("its rules are nested too deep");
            }
            if (nodes[next].order == 0) {
                go_down(next, level + 1);
                nodes[i].low = std::min(nodes[i].low, nodes[next].low);
            } else if (nodes[next].cycle == 0) {
                nodes[i].low = std::min(nodes[i].low, nodes[next].order);
            }
            depth = std::max(depth, nodes[next].depth);
            ways += nodes[next].ways;
            if (depth == DEEPEST || ways > MOST_WAYS) {
                throw std::runtime_error("its rules are nested too deep");
            }
        });
        nodes[i].depth = depth + 1;
        nodes[i].ways  = ways;
        if (nodes[i].low == nodes[i].order) {
            size_t last;
            do {
                last = open.back();
                open.pop_back();
                nodes[last].cycle = nodes[i].order;
            } while (last != i);
        }
    }
};

} // namespace

bool gvote_shim_grammar_check(const llama_vocab * vocab, const char * grammar, char * reason, size_t size) {
    const auto refuse = [&](const char * why) {
        std::snprintf(reason, size, "%s", why);
        return false;
    };
    try {
        if (is_nested_too_deep(grammar)) {
            return refuse("its parentheses are nested too deep");
        }
        llama_grammar_parser parser(vocab);
        parse(parser, grammar);
        checker(parser).check();
        const llama_sampler_ptr sampler(llama_sampler_init_grammar(vocab, grammar, "root"));
        return sampler != nullptr || refuse("left recursion: a rule leads back to itself before anything is read");
    } catch (const std::exception & error) {
        return refuse(error.what());
    } catch (...) {
        return refuse("llama.cpp raised an exception");
    }
}
