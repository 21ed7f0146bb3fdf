"""Plain nouns with different beginnings, for reading a fingerprint aloud over a telephone."""

_SPOKEN = """
acorn actor agent album alley amber angle ankle apple april anvil arena armor arrow atlas attic
autumn bacon badge baker bamboo banana banjo barrel basket beach beacon beaver bench berry bicycle bishop
blanket bonfire border bottle bracket branch bridge bronze bucket buffalo butter cabin cactus camel cargo cabbage
candle canoe canyon captain carbon cashew castle cedar cello cement chalk cherry chess chimney cinema circle
citrus clover cobalt coconut comet copper coral cotton cradle crayon cricket crystal curtain cymbal daisy dancer
desert diamond dinner dolphin donkey dragon drawer drummer eagle easel echo eclipse elbow ember engine envelope
falcon feather fender fiddle finger flamingo flute forest fossil fountain fridge galaxy garden garlic gazelle ginger
giraffe glacier goblet granite grape guitar hammer hatch harbor hedge hazel helmet hermit hockey honey horizon
hotel hunter iceberg igloo indigo insect island ivory jacket jaguar jasmine jelly jewel jigsaw jungle kayak
kettle kitchen kiosk koala ladder lagoon lantern laser lemon leopard lettuce library lizard lobster locket lotus
lumber magnet mango maple marble market meadow melon mirror mitten monkey mosaic mountain muffin museum mustard
napkin needle nickel nutmeg oasis ocean olive onion opal orbit orchid otter oyster paddle panda paper
parrot pebble pelican pencil pepper piano pigeon pillow pirate planet plaza pocket polar poppy potato prairie
puzzle pyramid quartz quilt rabbit radio raven ribbon river robot rocket saddle salmon sandal sapphire saturn
scarf seagull shadow silver siren spider spinach sponge squirrel statue sunset swallow tablet tango teapot temple
thunder tiger timber tomato tractor trumpet tulip tunnel turtle umbrella vanilla velvet violin volcano wagon walnut
"""
WORDS = tuple(_SPOKEN.split())
